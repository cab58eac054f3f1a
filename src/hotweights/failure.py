"""Failure: what is known of an update or a send that failed: whose code raised, and what the time was spent on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from .text import short, table
from .timeline import Timeline, TimelineEvent, breakdown, save_events

_BY = "hotweights: raised by "


@dataclass(frozen=True, slots=True)
class FailureReport:
    """What the time of an update or a send was spent on that failed. ``report`` of the error.

    Attributes:
        deed: what failed: ``"load"``, ``"update"`` or ``"send"``.
        version: the name of the version that did not come; ``None`` if it had none yet.
        seconds: from its beginning to the failure.
        events: what the time was spent on.
        since_epoch: when it began, in seconds since 1970; ``events`` count from there.
        receiver: the ``name=`` of the ``Receiver`` that it was to come by.
    """

    deed: str
    version: str | int | None
    seconds: float
    events: tuple[TimelineEvent, ...]
    since_epoch: float
    receiver: str = ""

    def as_dict(self) -> dict[str, object]:
        """The same facts for machines: only names, numbers, lists and dictionaries."""
        facts: dict[str, object] = msgspec.to_builtins(self)
        return facts | {"events": [event._asdict() for event in self.events]}

    def save_timeline(self, path: str | os.PathLike[str]) -> None:
        """Write what the time was spent on in the Chrome trace format, as the reports of what succeeds do."""
        who = "sender" if self.deed == "send" else self.receiver
        named = f"{'' if self.version is None else self.version} (failed)".strip()
        save_events(path, self.events, deed=self.deed, of=named, who=who, since_epoch=self.since_epoch)

    def __repr__(self) -> str:
        return f"<FailureReport of the {self.deed} of {short(self.version)}: {self.seconds:.3f} s>"

    def __str__(self) -> str:
        rows = [("failed", f"{self.deed} of version {self.version!r}, after {self.seconds:.3f} s")]
        return table([*rows, *breakdown(self.events)])


def failure_report(timeline: Timeline, deed: str, version: str | int | None) -> FailureReport:
    """The report of what fails now."""
    spent = timeline.elapsed()
    return FailureReport(deed, version, spent, tuple(timeline.events), timeline.since_epoch, timeline.receiver)


def blame(error: Exception, step: str) -> None:
    """Note whose code raised the error, if nothing nearer to it was noted. ``step`` is such as ``"check=norm"``."""
    if _blamed(error) is None:
        error.add_note(f"{_BY}{step}")


def said_by(error: BaseException, said: str) -> str:
    """What an error says, after whose code raised it."""
    step = _blamed(error)
    return said if step is None else f"{step} raised {said}"


def called(function: Callable[..., object]) -> str:
    """What a function of the caller is called in errors."""
    return str(getattr(function, "__qualname__", None) or repr(function))


def _blamed(error: BaseException) -> str | None:
    notes = (note for note in getattr(error, "__notes__", ()) if isinstance(note, str))
    return next((note.removeprefix(_BY) for note in notes if note.startswith(_BY)), None)
