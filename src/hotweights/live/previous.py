"""Previous: the version before, where a commit kept it. It can be made live again until the next update begins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from .. import signals
from ..errors import LiveModelError
from ..notices import log
from ..sharding import reshard
from .baseline import Baseline
from .compiled import refuse_frozen
from .job import Job
from .lock import WriteTurn
from .report import UpdateReport
from .state import Current, State
from .strategy import Strategy


class Previous:
    """What makes version N live again after M was committed. Made before that commit, by its update.

    Attributes:
        version: the name of version N.
        report: of what brought it.
    """

    def __init__(self, current: Current, baseline: Baseline, strategy: Strategy, job: Job) -> None:
        self.version: str | int | None = current.version
        self.report: UpdateReport | None = current.record.report
        self._names: Mapping[str, str] = current.names
        self._forget_plan: Callable[[], None] = baseline.plans.kept()
        self._baseline, self._strategy, self._job = baseline, strategy, job

    def put_back(self, current: Current) -> None:
        """Make it live. Nobody may read the model meanwhile."""
        self._strategy.abort()
        reshard(self._job.model.modules())
        self._forget_plan()
        self._baseline.written(self._job)
        current.version, current.names = self.version, self._names


def may_roll_back_to(current: Current) -> str | int | None:
    """The version that ``roll_back`` would make live; ``None`` where none is kept, or an update runs."""
    previous = current.previous
    return previous.version if isinstance(previous, Previous) and current.running is None else None


def used_up(previous: object, named: str | int | None) -> str:
    """Why this version is not kept any more, after an update that wrote over it, and did not become live."""
    assert isinstance(previous, Previous), "there is something to be lost"
    new = "an update that was aborted" if named is None else f"version {named!r}, which did not become live,"
    return (
        f"{new} used up the memory in which {previous.version!r} was kept. "
        f"live.update(source, version={previous.version!r}) takes it again from its source"
    )


@signals.held
def roll_back(current: Current, baseline: Baseline | None, timeout: float | None) -> str | int:
    """Make the version before live again, and call the hooks. Returns its name.

    Raises:
        LiveModelError: none was kept, or something else replaced or moved tensors; nothing was changed.
        TimeoutError: readers did not leave in time; nothing was changed.
        CommitHookError: the version before is live, and a hook failed.
    """
    failures: list[BaseException] = []
    turn = WriteTurn(current.guard, timeout, devices=set if baseline is None else baseline.devices)
    with current.reserved():
        previous = _kept(current)
        assert baseline is not None, "a version was committed"
        refuse_frozen()
        baseline.prove()
        turn.take()
    try:
        version = _put_back(current, previous)
        with current.guard.writer_reads():
            current.hooks.call(version, failures)
        if failures:
            raise failures[0]
        return version
    finally:
        _end(current, turn)
        log(logging.INFO, "version %r is live again", current.version)
        if failures:
            current.record.note_error(failures[0])
        failures.clear()  # Their tracebacks hold this frame.


def _kept(current: Current) -> Previous:
    previous = current.previous
    if isinstance(previous, Previous):
        return previous
    if current.holds is State.EMPTY:
        raise LiveModelError("nothing was loaded yet, so there is no version to go back from; call load first")
    if not current.keeps_previous:
        raise LiveModelError(
            f"{current}, and the version before was not kept; LiveModel(model, keep_previous=True) keeps it"
        )
    if current.holds is State.TORN:
        raise LiveModelError(f"{current}, and no version before is kept; call update with a complete source")
    raise LiveModelError(f"{current}, and no version before is kept: {current.gone}")


@signals.whole
def _put_back(current: Current, previous: Previous) -> str | int:
    current.previous = None
    current.gone = (
        f"version {current.version!r} was taken back already, and one step back is all there is. "
        f"live.update(source, version={current.version!r}) takes it again from its source"
    )
    current.record.note_rollback(current.version, previous.report)
    try:
        previous.put_back(current)
    except BaseException:
        current.holds = State.TORN
        raise
    assert current.version is not None, "the first load keeps nothing"
    return current.version


@signals.whole
def _end(current: Current, turn: WriteTurn) -> None:
    turn.give_back()
    current.end()
