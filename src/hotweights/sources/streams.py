"""LeaseStream: leases one after another, each ending when the next begins. It reads nothing itself."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ..errors import Closed
from ..memory.lease import Lease

T = TypeVar("T")


class LeaseStream:
    """Leases from a generator. A context manager and an iterator; a lease ends when the stream advances or closes.

    Leaving the ``with`` never waits for a lease: it ends it.
    """

    def __init__(self, leases: Generator[Lease, None, None], *, stop: Callable[[], None] = lambda: None) -> None:
        """``stop`` ends the generator's waits, so that ``close`` in one thread ends a ``next`` in another."""
        self._leases = leases
        self._stop = stop
        self._running: Lease | None = None
        self._closed = False
        self._ended = False

    def __iter__(self) -> Iterator[Lease]:
        return self

    def __next__(self) -> Lease:
        if self._ended:
            raise StopIteration
        if self._closed:
            raise Closed("this stream of leases was closed")
        self._end_running()
        try:
            self._running = next(self._leases, None)
        except BaseException:
            self._closed = True  # A generator that raised is exhausted; the next call must not look like the end.
            raise
        if self._running is None:
            self._ended = self._closed = True
            raise StopIteration
        return self._running

    def close(self) -> None:
        """End the running lease and every wait. May be called twice."""
        self._closed = True
        self._stop()
        try:
            self._end_running()
        finally:
            # If it runs, another thread waits in it; it was stopped and ends by itself.
            if inspect.getgeneratorstate(self._leases) != inspect.GEN_RUNNING:
                self._leases.close()

    def __enter__(self) -> LeaseStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(
                "a stream of leases was not closed; use it in a with", ResourceWarning, source=self, stacklevel=2
            )

    def _end_running(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.release()


def ahead(
    work: Iterable[Callable[[], T]],
    *,
    depth: int,
    stop: Callable[[], None],
    drop: Callable[[T], None] = lambda result: None,
) -> Generator[T, None, None]:
    """Do ``work`` in one other thread, ``depth`` results ahead of whoever takes them, in order.

    Closing the generator calls ``stop``, which must end work that is under way, waits for the thread, and gives every
    result that nobody took to ``drop``. With ``depth=0`` each piece is done when it is asked for, in the caller's
    thread.
    """
    if depth == 0:
        for piece in work:
            yield piece()
        return
    waiting: list[Future[T]] = []
    executor = ThreadPoolExecutor(1, thread_name_prefix="hotweights-ahead")
    try:
        for piece in work:
            waiting.append(executor.submit(piece))
            if len(waiting) > depth:
                result = waiting[0].result()  # An interrupted wait leaves it in the list, to be dropped.
                del waiting[0]
                yield result
        while waiting:
            result = waiting[0].result()
            del waiting[0]
            yield result
    finally:
        stop()
        executor.shutdown(wait=True, cancel_futures=True)
        for future in waiting:
            if not future.cancelled() and future.exception() is None:
                drop(future.result())
