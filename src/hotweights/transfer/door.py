"""Door: where a sender lets receivers in, whatever its address is. Endpoint: an address, for either end."""

from __future__ import annotations

import errno
import socket
from typing import NamedTuple, Protocol

from ..errors import AddressTaken, UsageError
from .carriers.table import DEFAULT
from .channel import Channel
from .flow import Inflow, Outflow

BACKLOG = 128
"""Connections that wait to be taken."""

PATIENCE = 10.0
"""Seconds in which a connection from another host says what it wants."""

SILENT = 64
"""Connections that may be open before they said what they want."""


def cannot_listen(address: str, error: OSError) -> AddressTaken | UsageError:
    """What to raise where nobody can listen."""
    if error.errno == errno.EADDRINUSE:
        return AddressTaken(f"{address} is held by another process on this host")
    return UsageError(f"nobody can listen at {address}: {error}")


class Guest(NamedTuple):
    """Somebody who connected, and what to call it before it has said who it is.

    ``flow`` is for its bytes; ``None`` where they lie in memory that both share.
    """

    channel: Channel
    name: str
    flow: Outflow | None


class Door(Protocol):
    """Where a sender listens.

    Attributes:
        address: as receivers name it.
    """

    address: str

    def sockets(self) -> list[socket.socket]:
        """What to wait for: one of them can be read from when ``admit`` may have somebody."""

    def admit(self) -> Guest | None:
        """The next connection, if one waits. The caller closes its channel.

        Raises:
            ProtocolError: the next one may not come in; it was told so.
            OSError: this process may open no more files.
        """

    def refused(self, reason: str) -> None:
        """Note why somebody was sent away."""

    def close(self) -> None:
        """Stop listening. May be called twice."""

    def forget(self) -> None:
        """In a forked child: close the copies, and leave what is the parent's."""


class Endpoint(Protocol):
    """An address. Making one only looks at how it is written.

    Attributes:
        address: as its user wrote it.
        retry: seconds between two tries to connect.
    """

    address: str
    retry: float

    def listen(self, carrier: str = DEFAULT) -> Door:
        """Listen there, for receivers whose bytes this carrier brings. The caller closes the door.

        Raises:
            AddressTaken: another sender is there.
            UsageError: nobody can listen there, or the carrier is unknown or not installed.
        """

    def connect(self) -> Channel | None:
        """A channel to the sender there; ``None`` while there is none. The caller closes it.

        Raises:
            TransferError: waiting does not help.
        """

    def flow(self, token: bytes, carrier: str) -> Inflow:
        """A flow from the sender there, which gave this token, and named the carrier. The caller closes it."""
