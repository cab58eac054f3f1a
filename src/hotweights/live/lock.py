"""ReadWriteLock: many readers or one writer, with deadlines. WriteTurn: one writer's hold on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import UsageError


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

    @contextmanager
    def reading(self, timeout: float | None) -> Iterator[None]:
        """Inside, nobody writes. Raises ``TimeoutError`` if that takes longer than ``timeout`` seconds."""
        me = threading.get_ident()
        with self._changed:
            if self._writer == me and not self._open:
                raise UsageError("this thread is writing the model; it cannot read it before it has committed")
            # A thread that reads already may read again: behind a waiting writer it would wait for itself.
            if self._writer != me and me not in self._readers:
                self._wait(lambda: self._writer is None and not self._waiting, timeout, "an update is writing")
            self._readers.append(me)
        try:
            yield
        finally:
            with self._changed:
                self._readers.remove(me)
                self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, nobody else reads or writes. Waits for readers without a limit."""
        self.begin_writing()
        try:
            yield
        finally:
            self.end_writing()

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

    def let_writer_read(self) -> None:
        """Let the writer's own thread read too, until it has done writing: hooks run in it."""
        with self._changed:
            self._writer, self._open = threading.get_ident(), True

    def end_writing(self) -> None:
        """Leave ``writing``: others are let in."""
        with self._changed:
            self._writer, self._open = None, False
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool], timeout: float | None, why: str) -> None:
        end = None if timeout is None else time.monotonic() + timeout
        while not ready():
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"waited {timeout} seconds: {why}")
            self._changed.wait(left if left is not None and left < 1 else 1.0)  # Slices let Ctrl-C through.


class WriteTurn:
    """One update's hold on the lock: taken at its first write, given back at its end.

    Attributes:
        held: whether readers are kept out now.
    """

    def __init__(self, serving: ReadWriteLock) -> None:
        self._serving = serving
        self._since = 0.0
        self._before = 0.0
        self.held = False

    @property
    def seconds(self) -> float:
        """For how long readers were kept out so far, in seconds."""
        return self._before + (time.perf_counter() - self._since if self.held else 0.0)

    def take(self) -> None:
        """Wait until nobody reads. May be called twice."""
        if not self.held:
            self._serving.begin_writing()
            self.held, self._since = True, time.perf_counter()

    def give_back(self) -> None:
        """Let readers in. May be called twice."""
        if self.held:
            self._before, self.held = self.seconds, False
            self._serving.end_writing()

    @contextmanager
    def briefly(self) -> Iterator[None]:
        """Inside, readers are kept out; afterwards it is as before."""
        held = self.held
        self.take()
        try:
            yield
        finally:
            if not held:
                self.give_back()
