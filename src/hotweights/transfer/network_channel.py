"""NetworkChannel: a channel between two hosts: through TLS where there are keys, and with an eye on the link."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable

from .. import signals
from ..errors import PeerLost, ProtocolError
from .channel import Channel
from .states import SessionState, Side
from .tls import Tls, speaks_tls

SILENCE = 4.0
"""Seconds after which a link that carries nothing back is cut. Processes that are busy are not: kernels answer."""

_ALERT = b"\x15\x03\x03\x00\x02\x02\x46"  # for who speaks no TLS: the fatal alert "protocol version"
_GONE = "a host that is gone"
_OFTEN = 1.0  # seconds between two looks at a link
_RETRIES = 2  # sent again so often and not acknowledged: silence is no accident
_TCP_INFO = struct.Struct("8B16I")  # linux/tcp.h: struct tcp_info, its beginning
_RETRANSMITS, _UNACKED, _LAST_ACK = 2, 12, 20  # fields of it; the last counts milliseconds


@signals.held_throughout
class NetworkChannel(Channel):
    """As every channel; no descriptors go through it, and bytes of slots have a connection of their own."""

    shares = False

    def __init__(
        self,
        connected: socket.socket,
        side: Side,
        tls: Tls | None,
        *,
        failed: Callable[[int], str] | None = None,
    ) -> None:
        """Takes over the socket, which may still be connecting.

        ``failed`` is told the error's number when no connection comes to be, and may have words for it.
        """
        self._failed = failed
        self._address = address_of(connected)
        super().__init__(connected, side)
        keep_alive(connected)
        self._tls = tls
        self._patient: bool | None = None
        self._looked = time.monotonic()
        self._moved()
        if tls is not None:
            self._put(tls.encrypted(b""))

    @property
    def host(self) -> str:  # type: ignore[override]
        """Where the other end is: the name in its certificate, or its address."""
        self._address = self._address or address_of(self.socket)  # Of a connection that is gone nobody can tell.
        return (self._tls and self._tls.name) or self._address or _GONE

    def _fill(self) -> bool:
        try:
            return super()._fill()
        except PeerLost as error:
            cause = error.__cause__ or self._failure
            # Before the sender's first word: after that it is a link that was cut.
            early = self.session.state in (SessionState.CONNECTED, SessionState.GREETED)
            if self._failed and early and isinstance(cause, OSError) and (words := self._failed(cause.errno or 0)):
                raise PeerLost(words) from error
            raise

    def is_due(self) -> bool:
        """Whether the link was not looked at for a second."""
        return time.monotonic() - self._looked >= _OFTEN

    def _outgoing(self, frame: bytes) -> bytes:
        return frame if self._tls is None else self._tls.encrypted(frame)

    def _incoming(self, raw: bytes) -> bytes:
        self._address = self._address or address_of(self.socket)
        if self._tls is None:
            if speaks_tls(raw) and not self._in:
                raise ProtocolError("the other end speaks TLS, and this end has no keys; both need keys= of one job")
            return raw
        try:
            return self._tls.decrypted(raw)
        except ProtocolError:
            if not self._tls.begun:
                self._put(_ALERT)
            raise
        finally:  # What TLS answers, an alert too.
            self._put(self._tls.encrypted(b""))
            self.flush()

    def _moved(self) -> None:
        """While the decision is under way, a link that is cut for a while must not end the connection.

        The kernel sends again what was lost, and who waits for the decision has a deadline. At all other times
        it is better to know soon.
        """
        deciding = SessionState.COMMITTED if self.session.side is Side.SENDER else SessionState.PREPARED
        patient = self.session.state is deciding
        if patient is self._patient:
            return
        self._patient = patient
        with contextlib.suppress(OSError):  # Whoever reads is told that it is closed.
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, not patient)

    def _silent(self) -> None:
        """See whether the other end's kernel acknowledges what was sent.

        Not ``TCP_USER_TIMEOUT``: that also ends connections to a process which is busy and reads nothing meanwhile.
        """
        self._looked = time.monotonic()
        if self._patient or self.session.state is SessionState.CONNECTED:
            return
        if seconds := seconds_cut(self.socket):
            raise PeerLost(f"the link to {self.host} is cut: for {seconds:.1f} s nothing came back")


def host_of(connected: socket.socket) -> str:
    """The address of the host at the other end, for people."""
    return address_of(connected) or _GONE


def address_of(connected: socket.socket) -> str:
    """The address of the host at the other end; empty if there is no connection."""
    try:
        return str(connected.getpeername()[0]).removeprefix("::ffff:")  # of a host that came by IPv4 to one of IPv6
    except OSError:
        return ""


def keep_alive(connected: socket.socket) -> None:
    """Have the kernel send at once, and ask an idle link's other end each second once ``SO_KEEPALIVE`` is set."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, int(SILENCE) - 1)


def keep_open(connected: socket.socket) -> None:
    """Have the kernel say something each minute where nothing is sent: firewalls forget connections that are silent.

    It takes five minutes without an answer until this one is given up: a link that is cut is noticed on the channel.
    """
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 60)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def seconds_cut(connected: socket.socket) -> float:
    """For how long a link has carried nothing back; 0 while it is not taken to be cut."""
    info = _TCP_INFO.unpack_from(connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))
    cut = info[_UNACKED] and info[_RETRANSMITS] >= _RETRIES and info[_LAST_ACK] > 1000 * SILENCE
    return info[_LAST_ACK] / 1000 if cut else 0.0
