"""Reports and plans as people meet them: on one line, in a notebook, and as JSON."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import hotweights as hw

LONG = "runs/" + "very/" * 100 + "long"
SEND = hw.SendReport(
    version=LONG,
    committed=("process 1", "process 2"),
    lost={"process 3": "it died"},
    problems={},
    tensors=3,
    nbytes=2_000_000,
    seconds=0.5,
    waited={},
    warnings=("the file is new", "so is another"),
)


class Reversed(nn.Linear):
    def load_weights(self, weights):
        loaded = set()
        for name, tensor in weights:
            getattr(self, name).data.copy_(tensor.flip(0))
            loaded.add(name)
        return loaded


def many():
    return nn.ModuleList(nn.Linear(2, 2) for _ in range(200))


def all_of_them(tmp_path):
    live = hw.LiveModel(many())
    live.load(many())
    parts = nn.ModuleDict({name: Reversed(2, 2) for name in "abcdef"})
    components = [hw.Component(f"{name}.", parts[name], name=name, enabled=name != "f") for name in "abcdef"]
    return {
        "plan": hw.trace(many(), many()),
        "load": hw.load(many(), many()),
        "update": live.update(many(), version=LONG),
        "route": hw.route(nn.ModuleDict({name: nn.Linear(2, 2) for name in "abcdef"}), components),
        "save": hw.save(many(), tmp_path / "saved"),
        "send": SEND,
    }


def test_reports(tmp_path):
    lines = {}
    for name, report in all_of_them(tmp_path).items():
        line = repr(report)
        assert len(line) <= 160, line
        assert "\n" not in line
        lines[name] = re.sub(r"\d+\.\d{3} s", "0.1 s", line)
        assert report._repr_html_().startswith("<pre>")
        assert report._repr_html_().endswith("</pre>")
        if hasattr(report, "as_dict"):
            facts = json.loads(json.dumps(report.as_dict()))
            assert set(facts) == {field.name for field in dataclasses.fields(report)}
    assert lines == {
        "plan": "<LoadPlan of 400 steps: 400 written>",
        "load": "<LoadReport 4.8 kB in 0.1 s: 400 written>",
        "update": "<UpdateReport 1 -> 'runs/very/very/very...very/very/very/long', 4.8 kB in 0.1 s: 400 written>",
        "route": "<RouteReport 120 B in 0.1 s to a, b, c and 2 more, 1 disabled>",
        "save": "<SaveReport 400 tensors, 4.8 kB in 1 file>",
        "send": "<SendReport 'runs/very/very/very...very/very/very/long', 2.0 MB in 3 tensors in 0.1 s: "
        "2 committed, 1 lost, 2 warnings>",
    }


@pytest.mark.parametrize(
    ("returned", "plain"),
    [
        (None, None),
        ({"b", "a"}, ["a", "b"]),
        (("a", 1), ["a", 1]),
        (torch.Size([2]), [2]),
        (hw.Fate.TIED, "<Fate.TIED: 'tied'>"),
    ],
)
def test_what_components_return(returned, plain):
    report = hw.RouteReport({"a": ()}, {"a": 0}, {"a": returned}, {}, {}, None, 0, 0.0)
    assert report.as_dict()["returned"] == {"a": plain}


SAVES = """
import sys
import hotweights as hw
from torch import nn

live = hw.LiveModel(nn.Linear(2, 2))
live.load(nn.Linear(2, 2), version="step-1").save_timeline(sys.argv[1])
"""


def test_timelines_of_two_processes_line_up(tmp_path):
    """Opened together, or merged into one list: each process has its own number and name, and one clock is theirs."""
    live = hw.LiveModel(nn.Linear(2, 2))
    before = time.time()
    live.load(nn.Linear(2, 2), version="step-0").save_timeline(tmp_path / "first.json")
    between = time.time()
    subprocess.run([sys.executable, "-c", SAVES, tmp_path / "second.json"], check=True, timeout=120)
    after = time.time()
    events = [json.loads((tmp_path / f"{name}.json").read_text())["traceEvents"] for name in ("first", "second")]
    bounds = ((before, between), (between, after))
    for several, (first, last) in zip(events, bounds, strict=True):
        (process,) = {event["pid"] for event in several}
        assert several[0]["name"] == "process_name"
        assert several[0]["args"] == {"name": f"hotweights (process {process})"}
        spans = [event for event in several if event["ph"] == "X"]
        rows = {event["tid"]: event["args"]["name"] for event in several if event["name"] == "thread_name"}
        assert spans
        for span in spans:
            assert rows[span["tid"]] == span["cat"]
            assert first - 0.01 <= span["ts"] / 1e6 <= (span["ts"] + span["dur"]) / 1e6 <= last + 0.01
    assert events[0][0]["pid"] == os.getpid() != events[1][0]["pid"]
