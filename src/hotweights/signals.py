"""Interruption: Ctrl-C and its like, held back while something is done that may not be cut short. It does nothing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interruption:
    """What was held back. Signals' handlers run in the main thread alone, between any two steps of what it does.

    Attributes:
        came: whether there was one.
    """

    def __init__(self, wake: Callable[[], object]) -> None:
        self.came = False
        self._wake = wake
        self._over = False
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._held: dict[int, FrameType | None] = {}

    def take_over(self) -> None:
        """From here on the first signal of each kind is held back, as far as Python handles it."""
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):
                self._before[number] = handler
                signal.signal(number, self._take)

    def let_go(self) -> None:
        """Handle what was held back, now that everything is as it was.

        Raises:
            BaseException: what the handler raises: ``KeyboardInterrupt``.
        """
        try:
            self._over = True  # From here on ours passes everything on, wherever it may still stand.
            self._put_back()
        finally:  # The next one may come in the midst of it.
            self._put_back()
        while self._held:
            number, frame = self._held.popitem()
            self._before[number](number, frame)

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._take:  # Nobody put another one there meanwhile.
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._over or number in self._held:  # Who insists is heard.
            self._before[number](number, frame)
            return
        self._held[number] = frame
        self.came = True
        self._wake()


@contextmanager
def held_back(wake: Callable[[], object]) -> Iterator[Interruption]:
    """Inside, the first signal of each kind waits for the end of the ``with``; a second one does not.

    Args:
        wake: is called when one comes, by its handler: to end a wait.
    """
    found = Interruption(wake)
    if threading.current_thread() is not threading.main_thread():  # No handler ever runs here.
        yield found
        return
    try:
        found.take_over()
        yield found
    finally:
        found.let_go()
