"""Network: ``tcps://host:port``: where a sender listens for other hosts, and how receivers get there."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import ssl
import time
import weakref
from urllib.parse import urlsplit

from .. import signals
from ..errors import AddressTaken, TransferError, UsageError
from ..notices import log
from .channel import Channel
from .door import BACKLOG, PATIENCE, SILENT, Door, Guest
from .flow import GREETING, TOKEN, Inflow, Outflow
from .handed_keys import HandedKeys
from .keys import Keys
from .network_channel import NetworkChannel
from .states import Side
from .tls import Tls

_WHOLE = len(GREETING) + TOKEN
_LOGGED = 100  # different complaints that are logged, of one sender
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
        self._keys = keys if keys is None or isinstance(keys, HandedKeys) else Keys(keys)
        if keys is None and not insecure and not _is_loopback(self._host):
            raise UsageError(
                f"{address} can be reached from other hosts, where without keys anybody could send or take weights. "
                f"Make some with: hotweights keys DIR --hosts {self._host}; and give keys=DIR to both ends. In a "
                "network where everybody may do so, insecure=True goes without"
            )

    def listen(self) -> Door:
        """Listen.

        Raises:
            AddressTaken: somebody else does.
            UsageError: this host has no such address.
        """
        addresses = _resolved(self._host, self._port)
        family, _, _, _, where = addresses[0]
        if not _is_loopback(self._host) and ipaddress.ip_address(str(where[0]).partition("%")[0]).is_loopback:
            raise UsageError(
                f"{self._host} is {where[0]} on this host, {socket.gethostname()}, and other hosts cannot reach that; "
                "name an address of a network that they are in"
            )
        context = None if self._keys is None else self._keys.serving((self._host, str(where[0])))
        return _NetworkDoor(self.address, self._host, family, where, context)

    def connect(self) -> Channel | None:
        """A channel that is being connected. A failure comes when it is read.

        Raises:
            UsageError: there is no key for this host.
            TransferError: this process may open no more files.
        """
        connecting = self._connecting()
        if connecting is None:
            return None
        try:
            tls = None
            if self._keys is not None:
                context = self._keys.connecting((str(connecting.getsockname()[0]),))
                tls = Tls(context, server=False, host=self._host)
            return NetworkChannel(connecting, Side.RECEIVER, tls)
        except BaseException:
            connecting.close()
            raise

    def flow(self, token: bytes) -> Inflow:
        """A connection for bytes, to the sender that gave this token.

        Raises:
            TransferError: this process may open no more files, or the host's name is known no more.
        """
        connecting = self._connecting()
        if connecting is None:
            raise TransferError(f"the name of {self._host} is not known any more")
        return Inflow(connecting, token)

    def _connecting(self) -> socket.socket | None:
        try:
            family, _, _, _, where = _resolved(self._host, self._port)[0]
        except UsageError:
            return None  # The name may be given when the sender starts, as Kubernetes does.
        try:
            connecting = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        except OSError as error:
            raise TransferError(f"no socket can be had: {error}") from error
        code = connecting.connect_ex(where)
        if code not in (0, errno.EINPROGRESS):
            connecting.close()
            if code in _AGAIN:
                return None
            raise TransferError(f"nobody can connect to {self.address}: {os.strerror(code)}")
        return connecting


def _parted(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None or parts.path or parts.query or parts.username:
        raise UsageError(f"an address on the network looks like tcps://trainer:7600; this is {address!r}")
    return host, port


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


class _Stranger:
    """A connection that has not said yet what it is for."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self.said = bytearray()  # of a greeting with a token


@signals.held_throughout
class _NetworkDoor:
    """Listens. What a connection is for, frames or bytes, shows by its first bytes: until then it waits here."""

    def __init__(
        self,
        address: str,
        host: str,
        family: socket.AddressFamily,
        where: tuple[str | int, ...],
        context: ssl.SSLContext | None,
    ) -> None:
        self._context = context
        self._unknown: dict[socket.socket, _Stranger] = {}
        self._flows: weakref.WeakValueDictionary[bytes, Outflow] = weakref.WeakValueDictionary()
        self._logged: set[str] = set()
        self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(where)
            self._socket.listen(BACKLOG)
        except OSError as error:
            self._socket.close()
            if error.errno == errno.EADDRINUSE:
                raise AddressTaken(f"{address} is held by another process on this host") from error
            raise UsageError(f"nobody can listen at {address}: {error}") from error
        except BaseException:
            self._socket.close()
            raise
        shown = f"[{host}]" if ":" in host else host
        self.address = f"tcps://{shown}:{self._socket.getsockname()[1]}"

    def sockets(self) -> list[socket.socket]:
        return [self._socket, *self._unknown]

    def admit(self) -> Guest | None:
        self._let_silent_go()
        while (channel := self._sorted()) is None:
            try:
                accepted, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return None
            accepted.setblocking(False)
            self._unknown[accepted] = _Stranger()
            self._let_silent_go()
        flow = Outflow()
        self._flows[flow.token] = flow
        return Guest(channel, f"somebody at {channel.host}", flow)

    def refused(self, reason: str) -> None:
        if reason not in self._logged and len(self._logged) < _LOGGED:
            self._logged.add(reason)
            log(logging.WARNING, "a connection to %s was refused: %s", self.address, reason)

    def close(self) -> None:
        self._socket.close()
        for waiting in self._unknown:
            waiting.close()
        self._unknown.clear()

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
                stranger.said += (more := waiting.recv(_WHOLE - len(stranger.said)))
            except BlockingIOError:
                continue
            except OSError:
                more = b""
            if len(stranger.said) == _WHOLE or not more:
                self._part(waiting, bytes(stranger.said))
        return None

    def _tls(self) -> Tls | None:
        return None if self._context is None else Tls(self._context, server=True)

    def _part(self, waiting: socket.socket, first: bytes) -> None:
        """Give a connection to the flow whose token it shows, once; close it otherwise."""
        del self._unknown[waiting]
        flow = self._flows.pop(first[len(GREETING) :], None)
        if flow is None:
            if first:
                self.refused(f"{_host_of(waiting)}: it showed a token that nobody was given, or that was shown before")
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
            self.refused(f"{_host_of(waiting)}: it connected and said nothing")
            waiting.close()


def _host_of(connected: socket.socket) -> str:
    with contextlib.suppress(OSError):
        return str(connected.getpeername()[0])
    return "a host that is gone"
