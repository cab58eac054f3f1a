"""What a sender reports, for programs and for people."""

import hotweights as hw

REPORT = hw.SendReport(
    version="step-1",
    committed=("process 1", "process 2"),
    lost={"process 3": "it died"},
    problems={"process 2": "a hook failed"},
    tensors=3,
    nbytes=2_000_000,
    seconds=0.5,
    waited={"process 1": 0.25},
    warnings=("the file is new",),
)


def test_for_programs_it_is_what_json_can_hold():
    assert REPORT.as_dict() == {
        "version": "step-1",
        "committed": ["process 1", "process 2"],
        "lost": {"process 3": "it died"},
        "problems": {"process 2": "a hook failed"},
        "tensors": 3,
        "nbytes": 2_000_000,
        "seconds": 0.5,
        "waited": {"process 1": 0.25},
        "warnings": ["the file is new"],
    }


def test_for_people_it_is_a_table():
    assert str(REPORT).splitlines() == [
        "      sent  2.0 MB in 3 tensors in 0.500 s (0.00 GB/s)",
        "   version  'step-1', taken by process 1, process 2",
        "    waited  0.250 s for process 1",
        "      lost  process 3: it died",
        "   warning  the file is new",
        "   problem  process 2: a hook failed",
    ]
