"""Ballot: what a group decided about one update, written once. It is no lock, so nobody can die holding it."""

from __future__ import annotations

import enum
import fcntl
import os

from ..errors import ProtocolError


class Decision(enum.Enum):
    """What becomes of an update. Each is a seal that a file can bear."""

    COMMIT = fcntl.F_SEAL_GROW
    ABORT = fcntl.F_SEAL_SHRINK


class Ballot:
    """One word that all members share: an empty memfd whose seals are the word.

    The kernel adds seals in one step, and ``F_SEAL_SEAL`` forbids every later one: whoever is first decides, and all
    others learn what was decided. A member that dies before the step has not written, after it has; there is nothing
    in between. Owns its descriptor; close it.
    """

    def __init__(self, descriptor: int) -> None:
        """Take over a descriptor that another member sent.

        Raises:
            ProtocolError: it can bear no seals. It is closed.
        """
        self.descriptor = descriptor
        try:
            fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError as error:
            self.close()
            raise ProtocolError(f"the ballot is no memory that can be sealed: {error}") from error

    @classmethod
    def new(cls) -> Ballot:
        """An empty one."""
        return cls(os.memfd_create("hotweights-ballot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))

    def decide(self, request: Decision) -> Decision:
        """Write ``request`` if nothing is written. Returns what is written then."""
        try:
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | request.value)
        except PermissionError:  # Somebody was first.
            found = self.read()
            assert found is not None
            return found
        return request

    def read(self) -> Decision | None:
        """What is written, if anything."""
        seals = fcntl.fcntl(self.descriptor, fcntl.F_GET_SEALS)
        if not seals & fcntl.F_SEAL_SEAL:
            return None
        return Decision.COMMIT if seals & Decision.COMMIT.value else Decision.ABORT

    def close(self) -> None:
        """Let go. May be called twice."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
