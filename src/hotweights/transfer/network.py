"""Network: ``tcps://host:port``: where a sender listens for other hosts, and how receivers get there."""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401  # Else the first lookup imports it: who forks meanwhile leaves the child its lock.
import errno
import ipaddress
import logging
import os
import socket
import ssl
import time
import weakref
from collections import deque
from typing import Protocol
from urllib.parse import urlsplit

from .. import signals
from ..errors import PeerLost, TransferError, UsageError
from ..notices import log
from .carriers.table import CARRIERS, DEFAULT, carrier_told
from .carriers.tls import TlsInflow, TlsOutflow
from .channel import Channel
from .door import BACKLOG, PATIENCE, SILENT, Door, Guest, cannot_listen
from .flow import GREETING, TOKEN, Carrier, Inflow
from .handed_keys import HandedKeys
from .keys import Keys, is_any
from .messages import NAME
from .network_channel import NetworkChannel, host_of, keep_open
from .states import Side
from .tls import Tls

RANK = b"\0rank"
"""What a rank of a sharded trainer says first, when it comes to the rank that leads; words follow, or TLS."""

_WHOLE = len(GREETING) + TOKEN
_LOGGED = 100  # different complaints that are logged, of one sender
_SYNS = 2  # sent again so often: some seven seconds, and then it is said that nobody answers
_UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT, errno.EHOSTDOWN)
_AGAIN = (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET)


@signals.held_throughout
class NetworkEndpoint:
    """An address on the network, for either end.

    Attributes:
        retry: seconds between two tries to connect.
    """

    retry = 0.1

    def __init__(self, address: str, keys: str | os.PathLike[str] | HandedKeys | None, insecure: bool) -> None:
        """Nothing is looked up yet.

        Raises:
            UsageError: it is no address, or others could reach it and nothing keeps them out.
        """
        self.address = address
        self._host, self._port = _parted(address)
        self._where = ""  # as last looked up
        self._unknown = ""  # why it was not found when it was last looked up
        self._failures = 0  # of connections: of several addresses of a name, the sender listens at one
        self._is_here = False  # whether all of them mean this host itself
        self._told: set[str] = set()  # why it could not be reached
        self._keys = keys if keys is None or isinstance(keys, HandedKeys) else Keys(keys)
        if keys is None and not insecure and not _is_loopback(self._host):
            named = socket.gethostname() if is_any(self._host) else self._host
            raise UsageError(
                f"{address} can be reached from other hosts, where without keys anybody could send or take weights. "
                f"Make some with: hotweights keys DIR --hosts {named}; and give keys=DIR to both ends. In a "
                "network where everybody may do so, insecure=True goes without"
            )

    def listen(self, carrier: str = DEFAULT) -> Door:
        """Listen.

        Raises:
            AddressTaken: somebody else does.
            UsageError: this host has no such address, or the carrier is unknown or not installed.
        """
        by = _told(carrier)
        if by.outflow is TlsOutflow and self._keys is None:
            raise UsageError(
                f"encrypt='all' needs keys=, and {self.address} has none: make some with hotweights keys DIR --hosts "
                f"{self._host}, and give keys=DIR to both ends"
            )
        addresses = _resolved(self._host, self._port)
        family, _, _, _, where = addresses[0]
        if not _is_loopback(self._host) and _means_loopback(addresses[0]):
            raise UsageError(
                f"{self._host} is {where[0]} on this host, {socket.gethostname()}, and other hosts cannot reach that; "
                "name an address of a network that they are in"
            )
        names = (self._host, str(where[0]))
        context = None if self._keys is None else self._keys.serving(names)
        whom = self._keys.pick(names) if isinstance(self._keys, Keys) else self._host
        return NetworkDoor(self.address, self._host, family, where, context, by, whom)

    def connect(self) -> Channel | None:
        """A channel that is being connected. A failure comes when it is read.

        Raises:
            UsageError: there is no key for this host.
            PeerLost: nobody knows the host's name yet.
            TransferError: this process may open no more files.
        """
        connecting = self.reach()
        if connecting is None:
            if self._unknown:
                raise PeerLost(self._unknown)
            return None
        try:
            return NetworkChannel(connecting, Side.RECEIVER, self.tls(connecting), failed=self._failed)
        except BaseException:
            connecting.close()
            raise

    def tls(self, connecting: socket.socket) -> Tls | None:
        """TLS for a connection from this host; ``None`` where there are no keys.

        Raises:
            UsageError: there is no key for this host.
        """
        context = self._context(connecting)
        return None if context is None else Tls(context, server=False, host=self._host)

    def _context(self, connecting: socket.socket) -> ssl.SSLContext | None:
        if self._keys is None:
            return None
        here = (self._host,) if _is_loopback(self._host) else ()  # Then this host is called so, too.
        return self._keys.connecting((str(connecting.getsockname()[0]), *here))

    def flow(self, token: bytes, carrier: str) -> Inflow:
        """A connection for bytes, to the sender that gave this token.

        Raises:
            TransferError: this process may open no more files, or the host's name is known no more; or the sender's
                carrier is unknown here.
            MissingPackage: the carrier needs a package that is not installed here.
        """
        by = _told(carrier)
        connecting = self.reach()
        if connecting is None:
            raise TransferError(f"the name of {self._host} is not known any more")
        with contextlib.suppress(OSError):  # Whoever reads is told that it is gone.
            keep_open(connecting)
        flow = by.inflow(connecting, token)
        if isinstance(flow, TlsInflow):
            context = self._context(connecting)
            if context is None:
                flow.close()
                raise TransferError("the sender encrypts the weights, and this end has no keys=")
            flow.protect(context, self._host)
        return flow

    def reach(self) -> socket.socket | None:
        """A socket on its way there; ``None`` while that cannot be. The caller closes it.

        Raises:
            TransferError: waiting does not help.
        """
        try:
            addresses, self._unknown = _resolved(self._host, self._port), ""
        except UsageError as error:
            self._unknown = str(error)
            return None  # The name may be given when the sender starts, as Kubernetes does.
        family, _, _, _, where = addresses[self._failures % len(addresses)]
        self._where = str(where[0])
        self._is_here = all(map(_means_loopback, addresses))
        try:
            connecting = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        except OSError as error:
            if len(addresses) > 1 and error.errno == errno.EAFNOSUPPORT:
                self._failures += 1
                return None
            raise TransferError(f"no socket can be had: {error}") from error
        with contextlib.suppress(OSError):
            connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, _SYNS)
        code = connecting.connect_ex(where)
        if code not in (0, errno.EINPROGRESS):
            connecting.close()
            self._failed(code)
            if code in _AGAIN or len(addresses) > 1:
                return None
            raise TransferError(f"nobody can connect to {self.address}: {os.strerror(code)}")
        return connecting

    def _failed(self, code: int) -> str:
        """Words for why no connection came to be; empty if there are no better ones. They are logged once: it may pass.

        Raises:
            UsageError: the name means this host itself, where nobody listens.
        """
        here = socket.gethostname()
        self._failures += 1
        if code == errno.ECONNREFUSED and not _is_loopback(self._host) and self._is_here:
            raise UsageError(
                f"{self._host} is {self._where} on this host, {here}, which is this host itself, and nobody listens "
                f"here; a line of /etc/hosts may say so. Give {self._host} its address on the network, or name that"
            )
        if code == errno.ECONNREFUSED:
            return f"nobody listens at {self._host} ({self._where}), port {self._port}: {os.strerror(code)}"
        if code not in _UNREACHABLE:
            return ""
        reason = f"this host, {here}, cannot reach {self._host} ({self._where}): {os.strerror(code)}"
        if reason not in self._told:
            self._told.add(reason)
            log(logging.WARNING, "%s; it is tried again", reason)
        return reason


def _told(carrier: str) -> Carrier:
    """The carrier that a sender names."""
    by = carrier_told(carrier)
    if by is None:
        known = ", ".join(CARRIERS)
        raise TransferError(
            f"the sender's carrier is {carrier[:NAME]!r}, and this hotweights has {known}; install the same one on both"
        )
    return by


def _parted(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None or parts.path or parts.query or parts.username:
        lacking = ": the port is missing" if host and port is None else ""
        raise UsageError(f"an address on the network looks like tcps://trainer:7600; this is {address!r}{lacking}")
    return host, port


def check_port(address: str) -> None:
    """See that the port is known before anybody listens there.

    Raises:
        UsageError: it is 0; or it is no address.
    """
    host, port = _parted(address)
    if port == 0:
        shown = f"[{host}]" if ":" in host else host
        raise UsageError(
            f"{address}: nobody can connect to port 0, by which a sender takes one that is free; give the port that it "
            f"has, which sender.address tells, or the same one at both ends, such as tcps://{shown}:7600"
        )


def check_target(address: str) -> None:
    """See that somebody can connect there.

    Raises:
        UsageError: as ``check_port``; or the host stands for all addresses of a host.
    """
    check_port(address)
    host, port = _parted(address)
    if is_any(host):
        raise UsageError(
            f"{address}: {host} is where a sender listens at every address of its host, and nobody connects to it; "
            f"give the name or address of that host, such as tcps://trainer:{port}"
        )


def _is_loopback(host: str) -> bool:
    """Whether only this host is meant, by name or number."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


_Resolved = tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[str | int, ...]]


def _resolved(host: str, port: int) -> list[_Resolved]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)  # type: ignore[return-value]
    except OSError as error:
        raise UsageError(f"this host, {socket.gethostname()}, does not know the name {host}: {error}") from error


def _means_loopback(resolved: _Resolved) -> bool:
    return ipaddress.ip_address(str(resolved[-1][0]).partition("%")[0]).is_loopback


class Attached(Protocol):
    """What takes over the connection that shows its token."""

    token: bytes

    def attach(self, connected: socket.socket) -> None:
        """Take it over."""


class _Stranger:
    """A connection that has not said yet what it is for."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self.said = bytearray()  # of a greeting with a token


@signals.held_throughout
class NetworkDoor:
    """Listens. What a connection is for, frames or bytes, shows by its first bytes: until then it waits here."""

    def __init__(
        self,
        address: str,
        host: str,
        family: socket.AddressFamily,
        where: tuple[str | int, ...],
        context: ssl.SSLContext | None,
        carrier: Carrier,
        whom: str,
    ) -> None:
        self._context, self._whom = context, whom
        self._carrier = carrier
        self._unknown: dict[socket.socket, _Stranger] = {}
        self._flows: weakref.WeakValueDictionary[bytes, Attached] = weakref.WeakValueDictionary()
        self._ranks: deque[tuple[socket.socket, Tls | None]] | None = None
        self._logged: set[str] = set()
        self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(where)
            self._socket.listen(BACKLOG)
        except OSError as error:
            self._socket.close()
            raise cannot_listen(address, error, where) from error
        except BaseException:
            self._socket.close()
            raise
        shown = f"[{host}]" if ":" in host else host
        self.address = f"tcps://{shown}:{self._socket.getsockname()[1]}"

    def sockets(self) -> list[socket.socket]:
        """As of every door."""
        return [self._socket, *self._unknown]

    def admit(self) -> Guest | None:
        """As of every door."""
        self._let_silent_go()
        while (channel := self._sorted()) is None:
            try:
                accepted, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return None
            accepted.setblocking(False)
            self._unknown[accepted] = _Stranger()
            self._let_silent_go()
        flow = self._carrier.outflow()
        if isinstance(flow, TlsOutflow):
            assert self._context is not None
            flow.protect(self._context)
        self._flows[flow.token] = flow
        return Guest(channel, f"somebody at {channel.host}", flow)

    def await_flow(self, flow: Attached) -> None:
        """The next connection that shows its token is this flow's."""
        self._flows[flow.token] = flow

    def take_ranks(self) -> list[tuple[socket.socket, Tls | None]]:
        """Connections of a trainer's ranks that came since the last call, which the caller closes. None come before."""
        ranks, self._ranks = self._ranks or (), deque()
        return list(ranks)

    def turn_ranks_away(self) -> None:
        """No rank is expected any more."""
        for waiting, _ in self.take_ranks():
            waiting.close()
        self._ranks = None

    def refused(self, reason: str) -> None:
        """Log it once."""
        if reason not in self._logged and len(self._logged) < _LOGGED:
            self._logged.add(reason)
            log(logging.WARNING, "a connection to %s was refused: %s", self.address, reason)

    def close(self) -> None:
        """Stop listening. May be called twice."""
        self._socket.close()
        for waiting in self._unknown:
            waiting.close()
        self._unknown.clear()
        self.turn_ranks_away()

    forget = close

    def _sorted(self) -> Channel | None:
        """The channel of a connection that has begun to speak frames. One for bytes goes to its flow."""
        for waiting, stranger in list(self._unknown.items()):
            try:
                # What is looked at and left there would end the next wait at once.
                first = bytes(stranger.said) or waiting.recv(1, socket.MSG_PEEK)
                if first and first[0] != GREETING[0]:
                    del self._unknown[waiting]
                    return NetworkChannel(waiting, Side.SENDER, self._tls())
                most = _WHOLE if len(stranger.said) >= len(GREETING) else len(GREETING)
                stranger.said += (more := waiting.recv(most - len(stranger.said)))
            except BlockingIOError:
                continue
            except OSError:
                more = b""
            if stranger.said == RANK:
                self._meet_rank(waiting)
            elif len(stranger.said) == _WHOLE or not more:
                self._part(waiting, bytes(stranger.said))
        return None

    def _meet_rank(self, waiting: socket.socket) -> None:
        del self._unknown[waiting]
        if self._ranks is None or len(self._ranks) >= BACKLOG:
            self.refused(f"{host_of(waiting)}: a trainer's rank came, and none is waited for")
            waiting.close()
        else:
            self._ranks.append((waiting, self._tls()))

    def _tls(self) -> Tls | None:
        return None if self._context is None else Tls(self._context, server=True, host=self._whom)

    def _part(self, waiting: socket.socket, first: bytes) -> None:
        """Give a connection to the flow whose token it shows, once; close it otherwise."""
        del self._unknown[waiting]
        flow = self._flows.pop(first[len(GREETING) :], None)
        if flow is None:
            if first:
                self.refused(f"{host_of(waiting)}: it showed a token that nobody was given, or that was shown before")
            waiting.close()
            return
        flow.attach(waiting)

    def _let_silent_go(self) -> None:
        """Of those that say nothing, the last few may still be about to."""
        late = time.monotonic() - PATIENCE
        silent = [waiting for waiting, stranger in self._unknown.items() if stranger.since < late]
        silent += list(self._unknown)[: max(0, len(self._unknown) - SILENT)]
        for waiting in dict.fromkeys(silent):
            del self._unknown[waiting]
            self.refused(f"{host_of(waiting)}: it connected and said nothing")
            waiting.close()
