"""What a sender reports, for programs and for people."""

import dataclasses
import json
import os

import pytest
import torch
from ends import Thread, receiver, sender
from processes import Tiny

import hotweights as hw
from hotweights.timeline import Timeline, TimelineEvent, breakdown

EVENTS = (
    TimelineEvent("wait for receivers", "", 0.0, 1.0),
    TimelineEvent("read", "", 1.0, 0.5),
    TimelineEvent("fill slots", "", 1.5, 0.25),
    TimelineEvent("read", "", 2.0, 1.0),
    TimelineEvent("decode", "", 2.5, 0.5),  # within
    TimelineEvent("say", "", 3.0, 0.125),
    TimelineEvent("wait for commits", "", 3.125, 0.875),
)
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
        "unwanted": [],
        "events": [],
        "network_nbytes": 0,
        "hosts": [],
        "since_epoch": 0.0,
        "published": None,
    }


def test_for_people_it_is_a_table():
    assert str(REPORT).splitlines() == [
        "      sent  2.0 MB in 3 tensors in 0.500 s (4.0 MB/s)",
        "   version  'step-1', taken by process 1, process 2",
        "    waited  0.250 s for process 1",
        "      lost  process 3: it died",
        "   warning  the file is new",
        "   problem  process 2: a hook failed",
    ]


def test_what_was_waited_for_before_the_offer_is_beside_the_seconds_that_leave_it_out():
    report = dataclasses.replace(REPORT, events=EVENTS)
    assert "in 0.500 s (4.0 MB/s), after 1.000 s of waiting for receivers" in str(report).splitlines()[0]


def test_five_lines_say_where_the_time_went_and_nothing_is_counted_twice():
    assert breakdown(EVENTS) == [
        ("time", "1.000 s (25%) wait for receivers"),
        ("", "1.000 s (25%) read"),
        ("", "0.500 s (12%) decode"),
        ("", "0.875 s (22%) wait for commits"),
        ("", "0.625 s (16%) other: fill slots, say, what has no name"),
    ]
    assert breakdown(()) == []


def test_one_that_follows_at_once_does_not_lie_within_the_one_before():
    first, second = TimelineEvent("a", "", 0.1, 0.2), TimelineEvent("b", "", 0.3, 0.1)
    assert first.start + first.seconds > second.start  # as floats are
    assert [row for _, row in breakdown((first, second))][:2] == ["0.200 s (50%) a", "0.100 s (25%) b"]


def test_each_wait_for_the_next_item_is_an_event(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hotweights.timeline.time.perf_counter", lambda: now[0])

    def items():
        for number in range(2):
            now[0] += 3.0
            yield number

    timeline = Timeline()
    for _ in timeline.each("read", items()):
        now[0] += 1.0
    assert timeline.events == [TimelineEvent("read", "", 0.0, 3.0), TimelineEvent("read", "", 4.0, 3.0)]


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("renamed", [None, {"new.": ""}])  # Other names hide no waits.
def test_both_ends_tell_where_their_time_went(digests, renamed, address, tmp_path):
    live = hw.LiveModel(Tiny())

    def work():
        with receiver(address, name="rank0") as source:
            live.load(source)
            return live.update(source, rename=renamed)

    with sender(address, digests=digests) as sending:
        worker = Thread(work)
        sending.send(Tiny(1), version=1)
        new = {("new." if renamed else "") + name: tensor for name, tensor in Tiny(2).state_dict().items()}
        sent = sending.send(((name, tensor) for name, tensor in new.items()), version=2)
        took = worker.result()
    ending = " and digest" if digests else ""
    waits = {"wait for receivers", "wait for answers to the offer", "wait until all are prepared", "wait for commits"}
    steps = {"read", f"fill slots{ending}", "wait for a free slot", "hand over slots"}
    assert {event.what for event in sent.events} == waits | steps
    waits = {"wait for the sender", "wait for the group", "give back slots"}
    assert {event.what for event in took.events} >= {*waits, "ask", f"copy{ending}", "prepare", "commit"}
    for report in (sent, took):
        assert all(event.start >= 0 and event.seconds >= 0 for event in report.events)
        assert sum("%) " in line for line in str(report).splitlines()) == 5
        report.save_timeline(tmp_path / "timeline.json")
        saved = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
        deed = "update" if report is took else "send"
        own = [event["cat"] for event in saved if event["ph"] == "X" and event["pid"] == os.getpid()]
        assert own == [deed, *(e.what for e in report.events)]
    (host,) = sent.hosts
    assert (host.host, host.workers, host.network_nbytes, host.shared_nbytes) == ("", 1, 0, sent.nbytes)
    assert (saved[0]["name"], saved[0]["args"]["name"].split()[0]) == ("process_name", "rank0")


def test_a_worker_that_refuses_many_tensors_says_few_lines(address):
    """What is wrong with hundreds of tensors in the same words is one problem with their count, at the trainer too."""

    def layers(width):
        return torch.nn.ModuleDict({"model": torch.nn.ModuleList(torch.nn.Linear(1, width) for _ in range(100))})

    live = hw.LiveModel(layers(2))

    def work():
        with receiver(address) as source:
            live.load(source)
            with pytest.raises(hw.UpdateAborted, match=r"version 2 was refused; version 1 is live: .*200 problems"):
                live.update(source)

    with sender(address) as sending:
        worker = Thread(work)
        sending.send(layers(2), version=1)
        with pytest.raises(hw.TransferAborted) as caught:
            sending.send(layers(3), version=2)
        worker.result()
    said = str(caught.value)
    assert "model.0.bias, model.1.bias, model.10.bias and 97 more: shape [2] expected, [3] found" in said
    assert said.count("model.") == 7  # The advice has one.
    assert said.count("aborted") == 1


def test_what_a_worker_refuses_is_a_list_with_its_advice(address):
    def work():
        with receiver(address) as source, pytest.raises(hw.PlanError):
            hw.load(torch.nn.Linear(2, 2), source)

    with sender(address) as sending:
        worker = Thread(work)
        with pytest.raises(hw.TransferAborted) as caught:
            sending.send(torch.nn.Linear(3, 4), version=1)
        worker.result()
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "- bias: shape [2] expected, [4] found",
        "- weight: shape [2, 2] expected, [4, 3] found",
        '- at the receiver: If another head is meant, allow_mismatched="*" keeps what the model has there.',
    ]
