"""ReadWriteLock: many readers or one writer, with deadlines. WriteTurn: one writer's hold on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .. import signals
from ..errors import UsageError

_SLICE = 0.1  # seconds; signals that come while a thread waits are delivered this often


class ReadWriteLock:
    """Many readers, or one writer. A writer that waits goes before readers that come after it.

    A thread that would wait for itself gets a ``UsageError`` instead.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # All of these change under the condition.
        self._readers: list[int] = []  # threads
        self._waiting = 0
        self._writer: int | None = None  # a thread
        self._open = False  # whether the writer's own thread may read

    @signals.held
    def begin_reading(self, timeout: float | None) -> None:
        """From here on nobody writes, until ``end_reading``.

        Raises:
            TimeoutError: a writer did not let go within ``timeout`` seconds.
        """
        me = threading.get_ident()
        with self._changed:
            if self._writer == me and not self._open:
                raise UsageError("this thread is writing the model; it cannot read it before it has committed")
            # A thread that reads already may read again: behind a waiting writer it would wait for itself.
            if self._writer != me and me not in self._readers:
                self._wait(lambda: self._writer is None and not self._waiting, timeout, "an update is writing")
            self._readers.append(me)

    @signals.whole
    def end_reading(self) -> None:
        """The end of one ``begin_reading`` of this thread."""
        with self._changed:
            self._readers.remove(threading.get_ident())
            self._changed.notify_all()

    @contextmanager
    @signals.held
    def writing(self) -> Iterator[None]:
        """Inside, nobody else reads or writes. Waits for readers without a limit."""
        self.begin_writing()
        try:
            yield
        finally:
            self.end_writing()

    @signals.held
    def begin_writing(self) -> None:
        """Enter ``writing``; ``end_writing`` leaves it."""
        me = threading.get_ident()
        with self._changed:
            if self._writer == me or me in self._readers:
                raise UsageError("this thread reads or writes the model; it cannot update it within that")
            self._waiting += 1
            try:
                self._wait(lambda: self._writer is None and not self._readers, None, "the model is being read")
                self._writer, self._open = me, False
            finally:
                self._waiting -= 1
                self._changed.notify_all()

    @signals.whole
    def let_writer_read(self) -> None:
        """Let the writer's own thread read too, until it has done writing: hooks run in it."""
        with self._changed:
            self._writer, self._open = threading.get_ident(), True

    @signals.whole
    def end_writing(self) -> None:
        """Leave ``writing``: others are let in."""
        with self._changed:
            self._writer, self._open = None, False
            self._changed.notify_all()

    @signals.held
    def _wait(self, ready: Callable[[], bool], timeout: float | None, why: str) -> None:
        end = None if timeout is None else time.monotonic() + timeout
        while not ready():
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"waited {timeout} seconds: {why}")
            self._changed.wait(_SLICE if left is None else min(left, _SLICE))
            signals.deliver()


class WriteTurn:
    """One update's hold on the lock: taken at its first write, given back at its end.

    Attributes:
        held: whether readers are kept out now.
    """

    def __init__(self, lock: ReadWriteLock) -> None:
        self._lock = lock
        self._since = 0.0
        self._before = 0.0
        self.held = False

    @property
    def seconds(self) -> float:
        """For how long readers were kept out so far, in seconds."""
        return self._before + (time.perf_counter() - self._since if self.held else 0.0)

    @signals.held
    def take(self) -> None:
        """Wait until nobody reads. May be called twice."""
        if not self.held:
            self._lock.begin_writing()
            self.held, self._since = True, time.perf_counter()

    @signals.whole
    def give_back(self) -> None:
        """Let readers in. May be called twice."""
        if self.held:
            self._before, self.held = self.seconds, False
            self._lock.end_writing()

    @contextmanager
    @signals.held
    def briefly(self) -> Iterator[None]:
        """Inside, readers are kept out; afterwards it is as before."""
        was_held = self.held
        self.take()
        try:
            yield
        finally:
            if not was_held:
                self.give_back()
