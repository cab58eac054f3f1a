"""The demo of three hosts: where it cannot run it says what to type; Ctrl-C leaves nothing; its picture is one."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from namespaces import why_not

SCRIPT = Path(__file__).parents[2] / "examples" / "demo_hosts.py"


@pytest.fixture(scope="module")
def demo():
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("demo_hosts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.mark.parametrize(
    ("reason", "user", "typed"),
    [
        ("network namespaces are made by root", 1000, "type: sudo make demo-hosts"),
        ("network namespaces are made by the program ip", 0, "type: apt-get install iproute2"),
        ("this machine lets nobody make network namespaces", 0, "--cap-add SYS_ADMIN --cap-add NET_ADMIN"),
        ("", 0, ""),
    ],
)
def test_where_it_cannot_run_it_says_what_to_type(reason, user, typed, demo, monkeypatch):
    monkeypatch.setattr(demo, "why_not", lambda: reason)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert demo.refusal().startswith(reason)
    assert typed in demo.refusal()


def test_the_picture_has_a_lane_for_each_worker(demo, tmp_path):
    had = [(number, f"gpu{host}{rank}", "step-1") for number, (host, rank) in enumerate(("1a", "1b", "2a", "2b"))]
    fleet = SimpleNamespace(began=0.0, had=[*had, (5.0, "gpu1a", "")], marks=[(6.0, "gpu1", "loses power")])
    demo.draw(fleet, tmp_path / "hosts.svg")
    drawn = ElementTree.parse(tmp_path / "hosts.svg").getroot()
    assert len([each for each in drawn if each.tag.endswith("rect")]) == 4


@pytest.mark.long
def test_ctrl_c_leaves_nothing():
    if reason := why_not():
        pytest.skip(reason)
    running = subprocess.Popen(
        [sys.executable, SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert running.stdout.readline().startswith("three hosts")
    for _ in range(3):  # As a terminal does, to all of them; and by somebody who is impatient.
        os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1
    assert said.endswith("demo-hosts: stopped; nothing is left behind\n")
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
    assert f"hw{running.pid}" not in left
    with pytest.raises(ProcessLookupError):
        os.killpg(running.pid, 0)
