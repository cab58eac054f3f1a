"""Record: what happened to a live model so far, for whoever asks how it is; and the one line that each update logs."""

from __future__ import annotations

import logging
import time

from ..failure import FailureReport, said_by
from ..notices import log, log_if_heard
from ..text import size
from .report import UpdateReport


class Record:
    """What happened so far. Changed by the thread that updates, read by any.

    Attributes:
        committed: how many loads and updates made their version live.
        failed: how many did not.
        report: of the load or update that brought the live version.
        act: what happened last: ``"load"``, ``"update"``, ``"rollback"`` or ``"failure"``.
        taken_back: the version that a rollback took back, until another one is live.
        warned: the warnings that were logged.
        error: what went wrong last, in a line; in a hook, too.
        failure: what the time of the load or update was spent on that failed last.
    """

    def __init__(self) -> None:
        self.committed = self.failed = 0
        self.report: UpdateReport | None = None
        self.error: str | None = None
        self.failure: FailureReport | None = None
        self.act: str | None = None
        self.taken_back: str | int | None = None
        self.warned: set[str] = set()
        self._live_since: float | None = None
        self._error_since: float | None = None

    def note_commit(self, report: UpdateReport) -> None:
        """Take note of a version that is live now."""
        self.committed += 1
        self.report, self._live_since = report, time.monotonic()
        self.act, self.taken_back = "load" if report.atomic is None else "update", None

    def note_rollback(self, taken_back: str | int | None, report: UpdateReport | None) -> None:
        """Take note that the version before, which came by this report, is live again."""
        self.report, self._live_since = report, time.monotonic()
        self.act, self.taken_back = "rollback", taken_back

    def note_failure(self, error: BaseException, said: str | None = None, report: FailureReport | None = None) -> None:
        """Take note of a load or update that failed, and say so: by ``said``, or as the error does."""
        self.failure = report
        self.failed += 1
        self.act = "failure"
        self.note_error(error, said)

    def note_error(self, error: BaseException, said: str | None = None) -> None:
        """Take note of what went wrong, be it that the version is live, and say so."""
        self.error, self._error_since = said or in_a_line(error), time.monotonic()
        log_if_heard(logging.WARNING, "%s", self.error)

    def status(self) -> dict[str, object]:
        """All of it as plain data."""
        report = self.report
        return {
            "committed": self.committed,
            "failed": self.failed,
            "last_act": self.act,
            "taken_back": self.taken_back,
            "seconds_since_commit": _since(self._live_since),
            "seconds_since_error": _since(self._error_since),
            "last_error": self.error,
            "last_failure": None if self.failure is None else self.failure.as_dict(),
            "last_report": None if report is None else report.as_dict(),
        }


def tell_commit(report: UpdateReport, known: set[str]) -> None:
    """Log that a version is live; and its warnings, but for those that are ``known`` from versions before."""
    for warning in report.warnings:
        if warning not in known:
            known.add(warning)
            log(logging.WARNING, "version %r: %s", report.version, warning)
    log(
        logging.INFO,
        "version %r is live, it was %r: %s read, %.3f seconds, readers were kept out for %.3f",
        report.version,
        report.previous,
        size(report.bytes_read),
        report.seconds,
        report.stall_seconds,
    )


def _since(then: float | None) -> float | None:
    return None if then is None else time.monotonic() - then


def in_a_line(error: BaseException) -> str:
    """The first line of what an error says, and who raised it."""
    return said_by(error, next(iter(str(error).splitlines()), repr(error)))
