"""Interruption: Ctrl-C and other signals, held back while something runs that may not be cut short."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interruption:
    """The signals that were held back. Python runs handlers in the main thread, between any two of its bytecodes.

    Attributes:
        came: whether a signal came.
    """

    def __init__(self, wake: Callable[[], object]) -> None:
        self.came = False
        self._wake = wake
        self._over = False
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._held: dict[int, FrameType | None] = {}

    def take_over(self) -> None:
        """Hold back the first signal of each kind from here on. Signals without a Python handler are left alone."""
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):
                self._before[number] = handler
                signal.signal(number, self._take)

    def let_go(self) -> None:
        """Put the handlers back, and handle what was held back.

        Raises:
            BaseException: what the handler raises: ``KeyboardInterrupt``.
        """
        try:
            self._over = True  # From here on our handler, where it still stands, passes signals on.
            self._put_back()
        finally:  # The handler of a signal that comes in the midst of it may raise: put back the rest.
            self._put_back()
        while self._held:
            number, frame = self._held.popitem()
            self._before[number](number, frame)

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._take:  # Nobody put another one there meanwhile.
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._over or number in self._held:  # The second one is not held back: the user insists.
            self._before[number](number, frame)
            return
        self._held[number] = frame
        self.came = True
        self._wake()


@contextmanager
def held_back(wake: Callable[[], object]) -> Iterator[Interruption]:
    """Inside, the first signal of each kind waits for the end of the ``with``; a second one does not.

    Args:
        wake: called by the handler when a signal comes, to end a wait.
    """
    interruption = Interruption(wake)
    if threading.current_thread() is not threading.main_thread():  # No handler ever runs here.
        yield interruption
        return
    try:
        interruption.take_over()
        yield interruption
    finally:
        interruption.let_go()
