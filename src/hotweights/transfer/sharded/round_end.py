"""RoundEnd: how a round ended, as words that every rank raises or returns in the same way."""

from __future__ import annotations

import msgspec

from ...errors import (
    Closed,
    HotweightsError,
    TransferAborted,
    TransferError,
    TransferIncomplete,
    TransferTimeout,
    UsageError,
)
from ..peers import told
from ..report import SendReport
from .words import RoundEnd

_LISTING = {kind.__name__: kind for kind in (TransferAborted, TransferTimeout, TransferError)}
_PLAIN = {kind.__name__: kind for kind in (UsageError, Closed)}


def succeeded(round: int, report: SendReport) -> RoundEnd:
    """It was sent."""
    return RoundEnd(round, report.version, report=msgspec.msgpack.encode(report))


def failed(round: int, version: str | int, error: BaseException, who: str) -> RoundEnd:
    """It was not. ``who`` met the error; of one that is not ours the others hear as of an update that was aborted."""
    kind = type(error).__name__
    if isinstance(error, TransferIncomplete):
        return RoundEnd(round, version, b"", kind, error.title, error.problems, error.committed)
    if isinstance(error, TransferError) and kind in _LISTING:
        return RoundEnd(round, version, b"", kind, error.title, error.problems)
    if kind in _PLAIN:
        return RoundEnd(round, version, b"", kind, str(error))
    return RoundEnd(round, version, b"", "TransferAborted", "the update was aborted", (f"{who}: {told(error)}",))


def error_of(outcome: RoundEnd) -> HotweightsError | None:
    """What the ranks raise; ``None`` if it was sent."""
    if not outcome.kind:
        return None
    if outcome.kind == TransferIncomplete.__name__:
        return TransferIncomplete(outcome.title, outcome.problems, committed=outcome.committed)
    if outcome.kind in _PLAIN:
        return _PLAIN[outcome.kind](outcome.title)
    return _LISTING.get(outcome.kind, TransferError)(outcome.title, outcome.problems)


def report_of(outcome: RoundEnd) -> SendReport:
    """What ``send`` returns on every rank."""
    return msgspec.msgpack.decode(outcome.report, type=SendReport)
