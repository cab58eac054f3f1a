"""Contenders in processes of their own, which do one refit at a time, in turns of random order; and the table of it."""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.table import Table

WARM = 2
"""Refits of each way before those that count: the first makes the plan."""
SECONDS = 900.0
"""Within which any single step must end."""

Way = Callable[[], tuple[float, float]]
"""Does one refit in its process; returns how long the engine stood, and how long all took."""


def taking_turns(make: Callable[..., Way], given: tuple[Any, ...], turns: Any) -> None:
    """A process that does one refit whenever it is told."""
    way = make(*given)
    turns.send("ready")
    while True:
        try:
            turns.recv()
        except (EOFError, ConnectionError):
            return
        turns.send(way())


@contextmanager
def process(make: Callable[..., Way], *given: Any) -> Iterator[Any]:
    """The end of a pipe by which a process is told to refit."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    contender = context.Process(target=taking_turns, args=(make, given, theirs))
    contender.start()
    theirs.close()
    try:
        assert answer_of(ours) == "ready"
        yield ours
    finally:
        ours.close()
        contender.join(60)
        contender.kill()
        contender.join()


def answer_of(turns: Any) -> Any:
    """What a process says next."""
    if not turns.poll(SECONDS):
        raise TimeoutError(f"no answer in {SECONDS:g} s")
    try:
        return turns.recv()
    except (EOFError, ConnectionError):
        raise SystemExit("a contender has ended; what it says is above") from None


def measured(ways: Mapping[str, Any], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """The times of each way, round by round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(-WARM, rounds):
        for name, turns in random.sample([*ways.items()], len(ways)):
            turns.send("go")
            times = answer_of(turns)
            if number >= 0:
                found[name].append(times)
    return found


def table(title: str, found: Mapping[str, list[tuple[float, float]]], stock: str) -> Table:
    """Medians, and ratios to ``stock``."""
    load = os.getloadavg()[0]
    shown = Table("", "stall, ms", "total, ms", "stall, ratio", "total, ratio", title=f"{title}; load {load:.1f}")
    for name, rounds in found.items():
        medians = [f"{statistics.median(each) * 1000:.0f}" for each in zip(*rounds, strict=True)]
        ratios = [
            statistics.median(here[which] / there[which] for here, there in zip(rounds, found[stock], strict=True))
            for which in (0, 1)
        ]
        shown.add_row(name, *medians, *(f"{ratio:.2f}" for ratio in ratios))
    return shown
