"""UpdateReport: what it counts, and what it calls by which name."""

import json
import threading
import time
from itertools import pairwise

import pytest
import torch
from served import live_model, version_of
from torch import nn

import hotweights as hw
from hotweights.plan.steps import Fate


@pytest.mark.parametrize("atomic", ["staged", "journal", False])
def test_waiting_for_readers_is_in_the_seconds(atomic, monkeypatch):
    live, waits, times = live_model(atomic), threading.Event(), []
    changed, inside = live._current.guard._changed, threading.Event()
    wait = changed.wait

    def waiting(timeout):
        times.append(time.perf_counter())
        waits.set()
        return wait(timeout)

    def reader():
        with live.serving():
            inside.set()
            assert waits.wait(30)
            times.append(time.perf_counter())

    thread = threading.Thread(target=reader)
    thread.start()
    assert inside.wait(30)
    monkeypatch.setattr(changed, "wait", waiting)
    report = live.update(version_of(2))
    thread.join()
    assert 0 < times[1] - times[0] <= report.wait_seconds <= report.seconds
    assert "wait for readers" in [event.what for event in report.events]
    assert report.stall_seconds <= report.seconds - report.wait_seconds
    assert f"{report.wait_seconds:.3f} s for readers" in str(report)


def test_what_only_leaves_alone_is_kept_and_not_missing():
    model = nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Linear(2, 2)})
    live = hw.LiveModel(model)
    live.load(model)
    report = live.update({"two.weight": torch.zeros(2, 2), "two.bias": torch.zeros(2)}, only="two.*")
    assert report.kept == ("one.bias", "one.weight")
    assert not report.tensors[Fate.MISSING]
    assert "left alone by only=: one.bias, one.weight" in str(report)
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
    assert live.update(model).kept == ()


def test_names_by_default_are_of_one_type():
    live, names = live_model(), []
    live.on_commit(names.append)
    live.update(version_of(2))
    live.update(version_of(3), version="step-3")
    live.update(version_of(4))
    live.update(version_of(5))
    live.update(version_of(6), version=60)
    live.update(version_of(7))
    assert names == [2, "step-3", "4", "5", 60, 7]


def test_a_timeout_counts_all_waits_of_an_update(monkeypatch):
    """The wait before processing too: what that took is not there for the commit."""
    live, given = live_model("staged"), []
    begin = live._current.guard.begin_writing

    def noted(timeout, *, of):
        given.append(timeout)
        return begin(timeout, of=of)

    monkeypatch.setattr(live._current.guard, "begin_writing", noted)
    live.update(version_of(2), timeout=30)
    assert given[0] == 30
    assert len(given) > 1
    assert all(second < first for first, second in pairwise(given))
