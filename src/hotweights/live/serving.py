"""Serving: many readers or one writer, with deadlines. It knows nothing of models."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Serving"]


class Serving:
    """A read/write guard. A writer that waits goes before readers that come after it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # All three change under the condition.
        self._readers = 0
        self._waiting = 0
        self._writing = False

    @contextmanager
    def reading(self, timeout: float | None) -> Iterator[None]:
        """Hold writers off. Raises ``TimeoutError`` after ``timeout`` seconds."""
        with self._changed:
            self._wait(lambda: not self._writing and not self._waiting, timeout, "an update is writing")
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def writing(self, timeout: float | None = None) -> Iterator[None]:
        """Hold readers and other writers off."""
        self.begin_writing(timeout)
        try:
            yield
        finally:
            self.end_writing()

    def begin_writing(self, timeout: float | None = None) -> None:
        """``writing`` without a block."""
        with self._changed:
            self._waiting += 1
            try:
                self._wait(lambda: not self._writing and not self._readers, timeout, "the model is being read")
                self._writing = True
            finally:
                self._waiting -= 1
                self._changed.notify_all()

    def end_writing(self) -> None:
        """Let the others in."""
        with self._changed:
            self._writing = False
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool], timeout: float | None, why: str) -> None:
        end = None if timeout is None else time.monotonic() + timeout
        while not ready():
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"waited {timeout} seconds: {why}")
            self._changed.wait(left if left is not None and left < 1 else 1.0)  # Slices let Ctrl-C through.
