"""Modes of torch in every thread that loading code starts or gives work to. It knows nothing of what they record."""

from __future__ import annotations

import concurrent.futures.thread
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

__all__ = ["in_every_thread"]


@contextmanager
def in_every_thread(*modes: Callable[[], AbstractContextManager[object]]) -> Iterator[Callable[[], bool]]:
    """Enter the modes in this thread and in those that start or are given work meanwhile: modes belong to threads.

    Gives a function that says whether any of that work is still under way.
    """
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit
    threads: list[threading.Thread] = []
    futures: list[Future[Any]] = []

    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode())
            yield

    def in_modes(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with entered():
            return work(*args, **kwargs)

    def recorded_start(self: threading.Thread) -> None:
        # A pool's thread outlives its work, so there only the work is put into the modes.
        if getattr(self, "_target", None) is not _POOL_WORKER:
            run = self.run

            def recorded_run() -> None:
                del self.__dict__["run"]
                in_modes(run)

            self.run = recorded_run  # type: ignore[method-assign]
            threads.append(self)
        start(self)

    def recorded_submit(self: ThreadPoolExecutor, work: Any, /, *args: Any, **kwargs: Any) -> Any:
        futures.append(submit(self, in_modes, work, *args, **kwargs))
        return futures[-1]

    def unfinished() -> bool:
        patience = time.monotonic() + _PATIENCE
        for thread in threads:
            thread.join(max(0.0, patience - time.monotonic()))
        return any(thread.is_alive() for thread in threads) or not all(future.done() for future in futures)

    threading.Thread.start, ThreadPoolExecutor.submit = recorded_start, recorded_submit  # type: ignore[method-assign, assignment]
    try:
        with entered():
            yield unfinished
    finally:
        threading.Thread.start, ThreadPoolExecutor.submit = start, submit  # type: ignore[method-assign]


_POOL_WORKER = getattr(concurrent.futures.thread, "_worker", None)
_PATIENCE = 0.5  # seconds that threads of the loading code have to end when it has returned
