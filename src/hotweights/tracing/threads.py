"""Modes of torch in every thread that loading code starts or gives work to: torch keeps modes by thread."""

from __future__ import annotations

import concurrent.futures.thread
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from ..signals import held
from .replaced import Replaced

Mode = Callable[[], AbstractContextManager[object]]


@contextmanager
@held
def in_every_thread(*modes: Mode) -> Iterator[Callable[[], bool]]:
    """Enter the modes in this thread, and in threads that it starts or gives work to, for that work.

    Several threads may be in such a block at once; the modes of each are entered for its own work only.

    Yields a function that says whether any of the work that was given away is still under way.
    """
    followed = _Followed(modes, _follows())
    with _STARTS.meanwhile(), _SUBMITS.meanwhile(), followed.entered():
        yield followed.unfinished


class _Followed:
    """The modes of one ``in_every_thread``, those around it, and the work that was given away inside."""

    def __init__(self, modes: tuple[Mode, ...], around: _Followed | None) -> None:
        self._modes = modes
        self._around = around
        self._threads: list[threading.Thread] = []
        self._futures: list[Future[Any]] = []

    @contextmanager
    @held
    def entered(self) -> Iterator[None]:
        """Inside, this thread is followed."""
        before, _here.followed = _follows(), self
        try:
            with ExitStack() as stack:
                for mode in self._modes:
                    stack.enter_context(mode())
                yield
        finally:
            _here.followed = before

    @held
    def run(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do the work in all of the modes, in another thread."""
        with ExitStack() as stack:
            for followed in reversed(self._chain()):
                stack.enter_context(followed.entered())
            return work(*args, **kwargs)

    def gave(self, *, thread: threading.Thread | None = None, future: Future[Any] | None = None) -> None:
        """Remember what was given away."""
        for followed in self._chain():
            followed._threads += [] if thread is None else [thread]
            followed._futures += [] if future is None else [future]

    def unfinished(self) -> bool:
        """Whether any of it is still under way, after a moment's patience."""
        patience = time.monotonic() + _PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, patience - time.monotonic()))
        return any(thread.is_alive() for thread in self._threads) or not all(future.done() for future in self._futures)

    def _chain(self) -> list[_Followed]:
        return [self, *(self._around._chain() if self._around is not None else ())]


class _Here(threading.local):
    """The block that this thread works for, if any."""

    followed: _Followed | None = None


_here = _Here()


def _follows() -> _Followed | None:
    return _here.followed


def _followed_start(self: threading.Thread) -> None:
    followed = _follows()
    # A pool's thread outlives its work, so there only the work is put into the modes.
    if followed is not None and getattr(self, "_target", None) is not _POOL_WORKER:
        run = self.run

        def followed_run() -> None:
            del self.__dict__["run"]
            followed.run(run)

        self.run = followed_run  # type: ignore[method-assign]
        followed.gave(thread=self)
    _STARTS.original(self)


def _followed_submit(self: ThreadPoolExecutor, work: Any, /, *args: Any, **kwargs: Any) -> Any:
    followed = _follows()
    if followed is None:
        return _SUBMITS.original(self, work, *args, **kwargs)
    future = _SUBMITS.original(self, followed.run, work, *args, **kwargs)
    followed.gave(future=future)
    return future


_STARTS = Replaced(threading.Thread, "start", _followed_start)
_SUBMITS = Replaced(ThreadPoolExecutor, "submit", _followed_submit)
_POOL_WORKER = getattr(concurrent.futures.thread, "_worker", None)
_PATIENCE = 0.5  # seconds that threads of the loading code have to end when it has returned
