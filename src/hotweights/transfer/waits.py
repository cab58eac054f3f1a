"""Waits for sockets and for a lock, which end at a deadline, or when another thread says so."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from .. import signals
from ..errors import TransferError, TransferTimeout
from .flow import Waitable

_LONGEST = 1e6  # seconds; the kernel counts milliseconds in an int. Longer waits return early, and are repeated


def left(deadline: float) -> float:
    """Seconds until ``deadline`` on the monotonic clock, never negative."""
    return max(0.0, deadline - time.monotonic())


@contextmanager
@signals.held
def holding(lock: threading.RLock, seconds: float) -> Iterator[None]:
    """Hold the lock inside.

    Raises:
        TransferTimeout: another thread held it for so long.
    """
    if not lock.acquire(timeout=min(seconds, threading.TIMEOUT_MAX)):
        raise TransferTimeout(f"another thread was still committing or refusing this version after {seconds:g} s")
    try:
        yield
    finally:
        lock.release()


class Waker:
    """Waits for sockets, and can be woken by any thread. Owns a descriptor; close it."""

    def __init__(self) -> None:
        """Take a descriptor.

        Raises:
            TransferError: this process may open no more files.
        """
        try:
            self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            raise TransferError(f"nothing to wait with can be had: {error}") from error
        # A thread could write to whatever has the number of a descriptor that another one just closed. A signal's
        # handler may wake a thread that holds it: so it can be taken twice.
        self._open = threading.RLock()

    def wake(self) -> None:
        """End the running wait, or the next one, at once."""
        with self._open:
            if self._event >= 0:
                os.eventfd_write(self._event, 1)

    def wait(
        self,
        sockets: Iterable[tuple[Waitable, bool]],
        seconds: float,
        stop: Callable[[], bool] = bool,
    ) -> set[int]:
        """Wait until a socket can be read from, or written to where it comes with ``True``.

        Returns the descriptors of those that can; none after ``seconds``, when woken, or when ``stop`` says true.
        """
        signals.deliver()  # Those that waited for what must be whole; from here on they end the wait.
        poll = select.poll()
        poll.register(self._event, select.POLLIN)
        for connected, write in sockets:
            poll.register(connected, select.POLLIN | (select.POLLOUT if write else 0))
        if stop():  # Not before: whoever changes the answer after this wakes the poll below.
            return set()
        ready = {descriptor for descriptor, _ in poll.poll(1000 * min(seconds, _LONGEST))}
        if self._event in ready:
            os.eventfd_read(self._event)
        return ready - {self._event}

    def close(self) -> None:
        """Let go. May be called twice."""
        with self._open:
            event, self._event = self._event, -1
            if event >= 0:
                os.close(event)
