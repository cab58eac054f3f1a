"""Runs a function in a process of its own and watches its memory from outside."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

_POLL = 0.003  # seconds between two looks at the child's memory


@dataclass
class Peak:
    """Memory of a child over what it had at ``Stage.begin``, in bytes.

    Attributes:
        anonymous: RssAnon, the process's own memory; looked at every few milliseconds.
        total: VmHWM, the kernel's own high-water mark; pages of mapped files count, though they are page cache.
    """

    anonymous: int = 0
    total: int = 0
    base: dict[str, int] = field(default_factory=dict)


class Stage:
    """The child's side: it says when the measured part begins and ends."""

    def __init__(self, pipe: multiprocessing.connection.Connection) -> None:
        self._pipe = pipe

    def begin(self) -> None:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets VmHWM
        self._say("begin")

    def end(self) -> None:
        self._say("end")

    def _say(self, word: str) -> None:
        self._pipe.send(word)
        self._pipe.recv()


def call(function: Callable[[Stage], Any], *, watch: bool) -> tuple[Any, Peak]:
    """``function(stage)`` in a fork; returns its result, or raises what it raised, and what memory it took."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(function, theirs), daemon=True)
    process.start()
    theirs.close()
    peak = Peak()
    try:
        outcome = _listen(ours, process.pid or 0, peak, watch)
    except EOFError:
        process.join()
        outcome = RuntimeError(f"the process ended with exit code {process.exitcode}")
    process.join()
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome, peak


def _child(function: Callable[[Stage], Any], pipe: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)  # The parent's threads are not here: torch would wait for them for ever.
    try:
        outcome = function(Stage(pipe))
    except BaseException as error:  # the parent raises it
        outcome = RuntimeError(f"{type(error).__name__}: {error}")
    pipe.send(("outcome", outcome))


def _listen(pipe: multiprocessing.connection.Connection, pid: int, peak: Peak, watch: bool) -> Any:
    running = False
    while True:
        while running and watch and not pipe.poll(_POLL):
            peak.anonymous = max(peak.anonymous, _status(pid)["RssAnon"] - peak.base["RssAnon"])
        said = pipe.recv()
        if said == "begin":
            peak.base, running = _status(pid), True
        elif said == "end":
            peak.total, running = _status(pid)["VmHWM"] - peak.base["VmRSS"], False
        else:
            return said[1]
        pipe.send("go")


def _status(pid: int) -> dict[str, int]:
    with open(f"/proc/{pid}/status") as file:
        return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in file if line.endswith(" kB\n")}


def wait_for_quiet(patience: float) -> bool:
    """Wait until the other processes leave nine tenths of the processors idle, ``patience`` seconds at most."""
    end = time.monotonic() + patience
    while True:
        before = _idle()
        time.sleep(0.1)
        if _idle() - before >= 0.9 * 0.1 * (os.cpu_count() or 1):
            return True
        if time.monotonic() > end:
            return False


def _idle() -> float:
    with open("/proc/stat") as file:
        _, _, _, _, idle, waiting, *_ = file.readline().split()
    return (int(idle) + int(waiting)) / os.sysconf("SC_CLK_TCK")
