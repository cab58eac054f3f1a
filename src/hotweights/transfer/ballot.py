"""Ballot: what a group decided about one update, written once. It is not a lock: nobody can die holding it."""

from __future__ import annotations

import fcntl
import os

from .. import signals
from ..errors import ProtocolError, TransferError
from .decision import Decision

_SEALS = {Decision.COMMIT: fcntl.F_SEAL_GROW, Decision.ABORT: fcntl.F_SEAL_SHRINK}


@signals.held_throughout
class Ballot:
    """The decision, in memory that all members share: an empty memfd whose seals say which it is.

    The kernel adds seals in one step, and ``F_SEAL_SEAL`` forbids every later one: the first to write decides, and all
    others read what was decided. A member that dies has written or has not; there is nothing in between. Owns its
    descriptor; close it.
    """

    def __init__(self, descriptor: int) -> None:
        """Take over a descriptor that another member sent.

        Raises:
            ProtocolError: it cannot be sealed. The descriptor is closed.
        """
        self.descriptor = descriptor
        try:
            fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError as error:
            self.close()
            raise ProtocolError(f"the ballot is no memory that can be sealed: {error}") from error
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
            self.close()
            raise ProtocolError("the ballot came so that its receiver cannot write to it")

    @classmethod
    @signals.held  # Else a signal might come before anybody has the descriptor.
    def new(cls) -> Ballot:
        """A ballot with nothing written.

        Raises:
            TransferError: this process may open no more files.
        """
        try:
            return cls(os.memfd_create("hotweights-ballot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        except OSError as error:
            raise TransferError(f"no ballot can be had: {error}") from error

    def decide(self, vote: Decision) -> Decision:
        """Write ``vote`` if nothing is written yet. Returns what is written then."""
        try:
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | _SEALS[vote])
        except PermissionError:  # Somebody was first.
            written = self.read()
            assert written is not None
            return written
        return vote

    def read(self) -> Decision | None:
        """What is written, if anything."""
        seals = fcntl.fcntl(self.descriptor, fcntl.F_GET_SEALS)
        if not seals & fcntl.F_SEAL_SEAL:
            return None
        return Decision.COMMIT if seals & _SEALS[Decision.COMMIT] else Decision.ABORT

    def close(self) -> None:
        """Let go. May be called twice."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
