"""SendHandle: a ``send`` that runs beside its caller, in a thread of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from .. import signals
from ..errors import TransferTimeout, UsageError
from ..notices import forgotten
from .report import SendReport

LAST_LINES = 1.0
"""Seconds to wait for the thread when it has let go of everything: then it has a few lines left."""

_Outcome = tuple[SendReport | None, BaseException | None]


class SendHandle:
    """What ``Sender.send(..., wait=False)`` returns. The tensors belong to the send until it is done.

    Ctrl-C in ``result`` ends that wait only; the send goes on. ``Sender.close`` ends the send. So does the end of the
    ``with`` of the sender. The interpreter waits at its exit for a send that still runs.

    Attributes:
        version: what is sent.
        thread: the one that sends.
    """

    @signals.whole
    def __init__(self, send: Callable[[], SendReport], version: str | int) -> None:
        """Begin. ``send`` is called once, in the new thread.

        Raises:
            RuntimeError: no thread can be started; ``send`` is not called.
        """
        self.version = version
        self._outcome: _Outcome = (None, None)
        self._told = False  # whether somebody asked how it ended
        self._finished = threading.Event()
        self._process = os.getpid()
        self.thread = threading.Thread(target=self._run, args=(send,), name="hotweights-send")
        self.thread.start()

    def done(self) -> bool:
        """Whether it has ended, well or not. The tensors are the caller's again then, and the sender can send."""
        return self._finished.is_set()

    def result(self, timeout: float | None = None) -> SendReport:
        """Wait for the end. May be called again, and by any thread.

        Args:
            timeout: seconds to wait at most; by default until the end, which the sender's own deadlines bound.

        Raises:
            TransferTimeout: the send still runs.
            UsageError: the send can never end while this waits: it is called by what is sent, or in a forked child.
            Exception: what ``Sender.send`` raises.
        """
        if self._process != os.getpid():
            raise UsageError(f"process {self._process}, which forked this one, sends this version; ask there")
        if threading.current_thread() is self.thread:
            raise UsageError(f"version {self.version!r} is being sent by this thread, which would wait for itself")
        if not self._finished.wait(timeout):
            raise TransferTimeout(f"version {self.version!r} is still being sent after {timeout:g} s; the send goes on")
        self.thread.join(LAST_LINES)
        self._told = True
        report, error = self._outcome
        try:
            if error is not None:
                raise error
            assert report is not None
            return report
        finally:
            del error  # Its traceback holds this frame.

    def __repr__(self) -> str:
        state = "running" if not self.done() else "failed" if self._outcome[1] is not None else "done"
        return f"<SendHandle of version {self.version!r}: {state}>"

    def __del__(self) -> None:
        if hasattr(self, "_outcome") and self._outcome[1] is not None and not self._told:
            forgotten(f"version {self.version!r} was not sent, and nobody asked: {self._outcome[1]}", self)

    def _run(self, send: Callable[[], SendReport]) -> None:
        self._outcome = _outcome(send)
        del send  # And with it the tensors.
        self._finished.set()


def _outcome(send: Callable[[], SendReport]) -> _Outcome:
    """What ``send`` gives or raises. The traceback holds no ``SendHandle``, which can tell then that it was dropped."""
    try:
        return send(), None
    except BaseException as error:
        return None, error
