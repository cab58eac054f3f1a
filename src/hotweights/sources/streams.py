"""LeaseStream: leases one after another, each of which ends when the next begins."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from .. import signals
from ..errors import Closed
from ..memory.digest import Digest, digest_of_bytes
from ..memory.lease import Lease
from ..notices import forgotten

T = TypeVar("T")


@signals.held_throughout
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
            # A generator that raised is exhausted. Without this the next call would look like the stream's end.
            self._closed = True
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
            # A generator that runs has another thread in it, cannot be closed, and ends by itself: it was stopped.
            if inspect.getgeneratorstate(self._leases) != inspect.GEN_RUNNING:
                self._leases.close()

    def __enter__(self) -> LeaseStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        # One that was interrupted while it was made, or before it began, holds nothing that could be given back.
        if not getattr(self, "_closed", True) and inspect.getgeneratorstate(self._leases) != inspect.GEN_CREATED:
            forgotten("a stream of leases was not closed; use it in a with", self)

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
    """Do ``work`` in another thread, in order, up to ``depth`` results ahead of whoever takes them.

    With ``depth=0`` each piece is done when it is asked for, in the caller's thread. Closing the generator calls
    ``stop``, which must end work that is under way; then it waits for the thread, and gives every result that nobody
    took to ``drop``.
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
                result = waiting[0].result()  # It is removed after this: an interrupted wait leaves it to be dropped.
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


def digest_of_leases(stream: Iterable[Lease], stopped: threading.Event | None = None) -> Digest:
    """The digest of all tensors of the stream; it is read to its end.

    Raises:
        Closed: ``stopped`` was set meanwhile.
    """
    found: dict[str, str] = {}
    for lease in stream:
        if stopped is not None and stopped.is_set():
            raise Closed("the source was closed while its digest was made")
        found[lease.name] = digest_of_bytes(lease.spec, lease.raw)
    return Digest.of(found)
