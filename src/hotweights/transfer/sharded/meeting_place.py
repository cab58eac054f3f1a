"""MeetingPlace: where the ranks of a trainer find the one that leads: by a socket of its host, or over the network."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from typing import Protocol
from urllib.parse import urlsplit

from xxhash import xxh3_128_hexdigest

from ...errors import ProtocolError, TransferError, UsageError
from ..address import Listener, check_peer, connect, path_of
from ..door import BACKLOG, Endpoint, cannot_listen
from ..endpoint import is_local
from ..network import RANK, NetworkEndpoint
from .link import Link
from .network_link import NetworkLink
from .rank_flow import RankOutflow


class Accepting(Protocol):
    """Where the lead takes ranks of its own host."""

    def sockets(self) -> list[socket.socket]:
        """What to wait for."""

    def accept(self) -> socket.socket | None:
        """The next connection, if one waits. The caller closes it."""

    def close(self) -> None:
        """Stop listening. May be called twice."""


class MeetingPlace(Protocol):
    """Where ranks meet.

    Attributes:
        address: as people read it.
    """

    address: str

    def listen(self) -> Accepting:
        """Listen for ranks of this host; those of others come where receivers come.

        Raises:
            AddressTaken: another sender is there.
            UsageError: nobody can listen there.
        """

    def reach(self) -> Link | None:
        """A link to the lead, which may be on its way still; ``None`` while there is none. The caller closes it.

        Raises:
            TransferError: waiting does not help.
        """

    def flow(self, token: bytes) -> RankOutflow:
        """A flow to the lead on another host, which gave this token. The caller closes it."""


class _PathPlace:
    """At a path beside that of a ``unix:`` address."""

    def __init__(self, address: str) -> None:
        self._path = f"{path_of(address)}.ranks"
        self.address = f"unix:{self._path}"

    def listen(self) -> Accepting:
        return Listener(self._path)

    def reach(self) -> Link | None:
        return _linked(self._path)

    def flow(self, token: bytes) -> RankOutflow:
        raise ProtocolError("rank 0 gave a token for bytes, which lie in memory that both share")


class _NetworkPlace:
    """At a ``tcps:`` address. On the lead's own host a socket is beside it that other hosts do not see."""

    def __init__(self, endpoint: NetworkEndpoint) -> None:
        self._endpoint = endpoint
        self.address = endpoint.address
        # Of this user: a name in the kernel has no owner. It is one of the network namespace, as the port is.
        self._name = f"\0hotweights-ranks-{xxh3_128_hexdigest(f'{os.geteuid()} {endpoint.address}'.encode())}"

    def listen(self) -> Accepting:
        return _NamedListener(self._name, self.address)

    def reach(self) -> Link | None:
        if (near := _linked(self._name)) is not None:
            return near
        connecting = self._endpoint.reach()
        if connecting is None:
            return None
        try:
            return NetworkLink(connecting, self._endpoint.tls(connecting), RANK)
        except BaseException:
            connecting.close()
            raise

    def flow(self, token: bytes) -> RankOutflow:
        connecting = self._endpoint.reach()
        if connecting is None:
            raise TransferError(f"{self.address} cannot be reached any more")
        return RankOutflow(connecting, token)


class _NamedListener:
    """A listening socket that has a name in the kernel, and no file."""

    def __init__(self, name: str, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            self._socket.bind(name)
            self._socket.listen(BACKLOG)
        except OSError as error:
            self._socket.close()
            raise cannot_listen(address, error) from error

    def sockets(self) -> list[socket.socket]:
        return [self._socket]

    def accept(self) -> socket.socket | None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            return self._socket.accept()[0]
        return None

    def close(self) -> None:
        self._socket.close()


def _linked(path: str) -> Link | None:
    connected = connect(path)
    if connected is None:
        return None
    try:
        check_peer(connected)
        return Link(connected)
    except BaseException:
        connected.close()
        raise


def places_of(endpoints: Sequence[Endpoint], ranks: int) -> list[MeetingPlace]:
    """Where so many ranks meet, by where the receivers come.

    Raises:
        UsageError: there is no address that they know.
    """
    network = [endpoint for endpoint in endpoints if isinstance(endpoint, NetworkEndpoint)]
    known = [endpoint for endpoint in network if urlsplit(endpoint.address).port]
    places: list[MeetingPlace] = [_PathPlace(endpoint.address) for endpoint in endpoints if is_local(endpoint.address)]
    places += [_NetworkPlace(endpoint) for endpoint in known]
    if not places and ranks == 1:
        places = [_NetworkPlace(endpoint) for endpoint in network]
    if not places:
        raise UsageError(
            f"the ranks of group= meet at the sender's address, and of {endpoints[0].address} none knows the port; "
            "give one, such as tcps://trainer:7600"
        )
    return places
