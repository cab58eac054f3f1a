"""Timeline: what the time of an update or of a send was spent on, for trace viewers and in a few lines for people."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from .signals import held
from .text import some

_LINES = 5  # of a breakdown
_ROUNDING = 1e-9  # seconds
_ABOVE_PIDS = 1 << 32  # numbers of tracks, which no process has
_Item = TypeVar("_Item")


class TimelineEvent(NamedTuple):
    """Something that time was spent on. It may lie within another one.

    Attributes:
        what: such as ``"read"``, ``"process"``, ``"write"``, ``"prepare"`` or ``"commit"``.
        of: the layer or the tensor; empty for what concerns all.
        start: seconds since the update, or the send, began.
        seconds: how long it took.
        open_nbytes: device memory of open layers when it ended.
    """

    what: str
    of: str
    start: float
    seconds: float
    open_nbytes: int = 0


class Timeline:
    """The events of one update or send, as they happen. One thread at a time writes to it.

    Attributes:
        events: those that have ended.
        began: when it began, by ``time.perf_counter``.
        since_epoch: the same by the clock that all processes of a host share: seconds since 1970.
        open_nbytes: says how much device memory open layers take now.
        receiver: the name of the receiver that takes part, if one does.
    """

    def __init__(self) -> None:
        self.events: list[TimelineEvent] = []
        self.began, self.since_epoch = time.perf_counter(), time.time()
        self.open_nbytes: Callable[[], int] = int
        self.receiver = ""

    @contextmanager
    @held
    def event(self, what: str, of: str = "") -> Iterator[None]:
        """Time what is done inside, as one event."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.note(what, of, began)

    @held
    def note(self, what: str, of: str, began: float) -> None:
        """Note an event that ends now. Where ``event`` would take longer than what it times."""
        now = time.perf_counter()
        self.events.append(TimelineEvent(what, of, began - self.began, now - began, self.open_nbytes()))

    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self.began

    def each(self, what: str, items: Iterable[_Item]) -> Iterator[_Item]:
        """The items; each wait for the next one is an event."""
        began = time.perf_counter()
        for item in items:
            self.note(what, "", began)
            yield item
            began = time.perf_counter()


def save_events(
    path: str | os.PathLike[str],
    events: Iterable[TimelineEvent],
    *,
    deed: str,
    of: str,
    who: str = "",
    since_epoch: float = 0.0,
    tracks: Mapping[str, Iterable[TimelineEvent]] | None = None,
) -> None:
    """Write events in the Chrome trace format, for ``chrome://tracing`` or ui.perfetto.dev.

    Files of several processes of one host line up: their times are those of one clock, and each has its own process,
    with one name in all its files. A row of its own says which version each is of.

    Args:
        path: of the file, which is written anew.
        events: what to write.
        deed: what was done, such as ``"update"``: a span of its own, around all others.
        of: the version.
        who: did it; the number of the process is added.
        since_epoch: when that began, see ``Timeline``.
        tracks: of others, by name, with a row for each ``of``.
    """
    events, process = list(events), os.getpid()
    shown = [TimelineEvent(deed, of, 0.0, max(map(_end, events), default=0.0)), *events]
    rows = {event.what: zlib.crc32(event.what.encode()) for event in shown}  # One row each, the same in every file.
    titles = [_title("process_name", process, 0, f"{who or 'hotweights'} (process {process})")]
    titles += [_title("thread_name", process, row, what) for what, row in rows.items()]
    spans = [
        {"name": f"{event.what} {event.of}".strip(), "cat": event.what, "ph": "X", "pid": process}
        | {"tid": rows[event.what], "ts": _microseconds(since_epoch + event.start), "dur": event.seconds * 1e6}
        for event in shown
    ]
    counters = [
        {"name": "open layers, device bytes", "ph": "C", "pid": process, "args": {"bytes": event.open_nbytes}}
        | {"ts": _microseconds(since_epoch + _end(event))}
        for event in events
    ]
    try:
        with open(path, "w") as file:
            json.dump({"traceEvents": [*titles, *spans, *counters, *_of_others(tracks or {}, since_epoch)]}, file)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)  # A full disk names no file.
        raise


def _of_others(tracks: Mapping[str, Iterable[TimelineEvent]], since_epoch: float) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for name, own in tracks.items():
        events, process = list(own), _ABOVE_PIDS + zlib.crc32(name.encode())
        found.append(_title("process_name", process, 0, name))
        rows = {event.of: zlib.crc32(event.of.encode()) for event in events}
        found += [_title("thread_name", process, row, of) for of, row in rows.items()]
        found += [
            {"name": event.what, "cat": event.what, "ph": "X", "pid": process, "tid": rows[event.of]}
            | {"ts": _microseconds(since_epoch + event.start), "dur": event.seconds * 1e6}
            for event in events
        ]
    return found


def _title(kind: str, process: int, row: int, name: str) -> dict[str, object]:
    return {"name": kind, "ph": "M", "pid": process, "tid": row, "args": {"name": name}}


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def breakdown(events: Sequence[TimelineEvent]) -> list[tuple[str, str]]:
    """What the time was spent on: rows of a table, five at most. Nothing is counted twice."""
    spent = _seconds_by_kind(events)
    total = max(map(_end, events), default=0.0)
    if not total:
        return []
    by_size = sorted(spent, key=spent.__getitem__, reverse=True)
    most, others = by_size[: _LINES - 1], by_size[_LINES - 1 :]
    # As they began, which tells more than by size.
    shown = [(what, seconds) for what, seconds in spent.items() if what in most]
    rest = total - sum(seconds for _, seconds in shown)
    shown.append((f"other: {some([*others, 'what has no name'], 4)}", max(rest, 0.0)))
    return [
        ("" if number else "time", f"{seconds:.3f} s ({seconds / total:3.0%}) {what}")
        for number, (what, seconds) in enumerate(shown)
    ]


def _seconds_by_kind(events: Iterable[TimelineEvent]) -> dict[str, float]:
    """Seconds of each kind, without those of events that lie inside."""
    spent: dict[str, float] = defaultdict(float)
    around: list[TimelineEvent] = []  # the innermost last
    for event in sorted(events, key=lambda event: (event.start, -event.seconds)):
        # By the ends: rounded, one that follows at once may begin before the one before has ended.
        while around and _end(event) > _end(around[-1]) + _ROUNDING:
            around.pop()
        if around:
            spent[around[-1].what] -= event.seconds
        spent[event.what] += event.seconds
        around.append(event)
    return spent


def _end(event: TimelineEvent) -> float:
    return event.start + event.seconds
