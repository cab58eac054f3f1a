"""Door: where a sender lets receivers in, whatever its address is. Endpoint: an address, for either end."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path
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


_LISTENS = "0A"  # the state of a socket that listens, in /proc/net/tcp


def cannot_listen(address: str, error: OSError, where: tuple[str | int, ...] = ()) -> AddressTaken | UsageError:
    """What to raise where nobody can listen. ``where``: address and port, if it is one on the network."""
    here = socket.gethostname()
    if error.errno == errno.EADDRINUSE:
        pid = _listener(int(where[1])) if where else 0
        holder = f"process {pid}" if pid else "another process"
        return AddressTaken(f"{address} is held by {holder} on this host, {here}; end it, or use another port")
    if error.errno == errno.EADDRNOTAVAIL and where:
        return UsageError(
            f"nobody can listen at {address}: {where[0]} is no address of this host, {here}; start it on the host that "
            "has it, or name an address of this one"
        )
    return UsageError(f"nobody can listen at {address}: {error}")


def _listener(port: int) -> int:
    """The process that listens at a port of this network namespace; 0 if that cannot be seen."""
    lines = [line.split() for table in ("tcp", "tcp6") for line in _lines(f"/proc/net/{table}")]
    sockets = {f"socket:[{line[9]}]" for line in lines if line[3] == _LISTENS and line[1].endswith(f":{port:04X}")}
    for opened in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # It was closed meanwhile, or belongs to another user.
            if os.readlink(opened) in sockets:
                return int(opened.parts[2])
    return 0


def _lines(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text().splitlines()[1:]
    return []


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
