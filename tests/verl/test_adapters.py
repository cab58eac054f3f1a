"""Adapters that verl's trainer pushes, with its real sender and vLLM's worker: taken whole, or the one before stays."""

from stack import run


def test_an_engine_takes_adapters_whole(tmp_path):
    wrong = [("A", 2, what) for what in ("half", "large", "shape", "killed")]
    taken = [("A", 1, "adapter"), *wrong, ("A", 2, "adapter"), ("B", 2, "base"), ("B", 2, "half"), ("B", 1, "adapter")]
    early, first, *refused, second, base, late, last = run(
        "adapters.py", folder=tmp_path, start="A", rounds=[("A", 1, "large"), *taken]
    )
    (none_a, one_a, two_a), (none_b, one_b, _) = (
        run("adapters.py", folder=tmp_path, start=start, rounds=[]) for start in "AB"
    )
    assert len({*map(tuple, (none_a, one_a, two_a, none_b, one_b))}) == 5
    for without, fresh in ((early, none_a), (late, none_b)):
        assert without[2] == fresh
        assert "has no adapter" in without[1]
    assert "max_lora_rank" in early[1]
    for got, fresh in ((first, one_a), (second, two_a), (base, none_b), (last, one_b)):
        assert got[1:] == [None, fresh, 0], got[0]
    words = {
        "half": "are missing",
        "large": "before",
        "shape": "and (256, 8) before",
        "killed": "had not sent all",
    }
    for what, raised, tokens, code in refused:
        assert words[what] in raised, what
        assert "has the adapter before" in raised, what
        assert tokens == one_a, what
        assert code == (-9 if what == "killed" else 0), what
