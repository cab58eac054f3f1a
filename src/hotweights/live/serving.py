"""Serving: one reader's hold on a live model. No update writes while it lasts, and what is read is of one version."""

from __future__ import annotations

from .. import signals
from ..errors import LiveModelError, UsageError
from .lock import Hold
from .state import Current, State


class Serving:
    """What ``LiveModel.serving`` gives: a context manager for ``with`` and ``async with``.

    It may be entered again when it was left, not before.

    It gives the version's name.
    """

    def __init__(self, current: Current, timeout: float | None) -> None:
        self._current = current
        self._timeout = timeout
        self._hold: Hold | None = None
        self._watcher: object = None
        self._entered = False

    @signals.held
    def __enter__(self) -> str | int | None:
        self._begin()
        self._watcher = signals.watch()
        try:
            self._hold = self._current.guard.begin_reading(self._timeout)
            return self._version()
        except BaseException:
            self._leave()
            raise

    @signals.held
    def __exit__(self, *error: object) -> None:
        self._leave()
        signals.deliver()  # Others may watch on, in other tasks: what came while this one left is not kept for those.

    # Between beginning and end signals are not watched here: asyncio.run puts its handler of Ctrl-C away when the
    # main task is done, before it ends the others, and would miss it.

    async def __aenter__(self) -> str | int | None:
        self._begin()
        try:
            await self._current.guard.begin_reading_async(self._timeout, self._take)
            return self._version()
        except BaseException:
            self._leave_watched()
            raise

    async def __aexit__(self, *error: object) -> None:
        self._leave_watched()

    @signals.held
    def __del__(self) -> None:
        if getattr(self, "_hold", None) is not None:  # Ctrl-C came at the first instruction of ``__aexit__``.
            self._leave()

    @signals.held
    def _begin(self) -> None:
        if self._entered:  # The first hold would be lost, and no update could write any more.
            raise UsageError("this serving() is entered already; call serving() for each with")
        self._entered = True

    @signals.whole
    def _take(self, hold: Hold) -> None:
        self._hold = hold

    @signals.watched
    def _leave_watched(self) -> None:
        self._leave()

    @signals.whole
    def _leave(self) -> None:
        if self._hold is not None:
            self._current.guard.end_reading(self._hold)
            self._hold = None
        self._entered = False
        signals.unwatch(self._watcher)

    @signals.held
    def _version(self) -> str | int | None:
        # What the model holds, not what runs: an update of a torn model has not mended it before it has committed.
        if not self._current.checking and self._current.holds is State.EMPTY:
            raise LiveModelError("nothing was loaded yet, so there is nothing to serve; call load first")
        if not self._current.checking and self._current.holds is State.TORN:
            raise LiveModelError(
                "the model is torn: it holds tensors of two versions; call update with a complete source"
            )
        signals.deliver()
        return self._current.version
