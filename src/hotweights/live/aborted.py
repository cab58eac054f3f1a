"""Aborted: what tells that an error ended an update, and what is live."""

from __future__ import annotations

from ..errors import HotweightsError, UpdateAborted
from ..failure import failure_report, said_by
from ..timeline import Timeline
from .lock import StillRead
from .state import Current

_OF_LOAD = ("allow_", "by=")  # Options of advice that updates do not have.
_WHERE = (
    "It is said in the first load, LiveModel.load(), or of an engine in --model-loader-extra-config, and holds for all "
    "updates."
)


def aborted(
    current: Current, version: str | int | None, what: str, error: Exception, timeline: Timeline | None = None
) -> UpdateAborted:
    """What tells that ``error`` ended an update, and what is live. It is recorded.

    Args:
        current: of the live model, after the abort.
        version: the name of the version that does not become live; ``None`` if it has none yet.
        what: became of it: ``"was refused"``, before anything was changed, or ``"failed"``.
        error: says why.
        timeline: what the time was spent on, if it had begun.
    """
    said = said_by(error, _named(error))
    lines: list[str] = getattr(error, "advice", "").splitlines()
    if of_load := [number for number, line in enumerate(lines) if any(option in line for option in _OF_LOAD)]:
        lines[of_load[-1]] += " " + _WHERE
    if isinstance(error, StillRead):  # It says nothing about the version.
        what, said = "was not taken", f"{error}. Nothing is wrong with the version: try again"
    title: str | None = getattr(error, "title", None)
    told = UpdateAborted(
        f"{called(version)} {what}; {current}: {said if title is None else said_by(error, title)}",
        getattr(error, "problems", ()),
        advice="\n".join(lines),
    )
    told.report = None if timeline is None else failure_report(timeline, "update", version)
    current.record.note_failure(told, report=told.report)
    return told


def _named(error: Exception) -> str:
    if isinstance(error, HotweightsError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def called(version: str | int | None) -> str:
    """A version in the words of a message."""
    return "the update" if version is None else f"version {version!r}"
