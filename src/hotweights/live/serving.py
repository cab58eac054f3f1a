"""Serving: one reader's hold on a live model. No update writes while it lasts, and what is read is of one version."""

from __future__ import annotations

from .. import signals
from ..errors import LiveModelError
from .state import Current, State


class Serving:
    """What ``LiveModel.serving`` gives. A context manager, to be entered once; it gives the version's name."""

    def __init__(self, current: Current, timeout: float | None) -> None:
        self._current = current
        self._timeout = timeout
        self._watcher: object = None

    @signals.held
    def __enter__(self) -> str | int | None:
        self._watcher = signals.watch()
        try:
            self._current.guard.begin_reading(self._timeout)
        except BaseException:
            signals.unwatch(self._watcher)
            raise
        try:
            self._check()
            signals.deliver()
        except BaseException:
            self.__exit__()
            raise
        return self._current.version

    @signals.whole
    def __exit__(self, *error: object) -> None:
        self._current.guard.end_reading()
        signals.unwatch(self._watcher)

    def _check(self) -> None:
        # What the model holds, not what runs: an update of a torn model has not mended it before it has committed.
        if self._current.holds is State.EMPTY:
            raise LiveModelError("nothing was loaded yet, so there is nothing to serve; call load first")
        if self._current.holds is State.TORN:
            raise LiveModelError(
                "the model is torn: it holds tensors of two versions; call update with a complete source"
            )
