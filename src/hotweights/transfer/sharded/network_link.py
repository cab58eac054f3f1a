"""NetworkLink: a link between ranks on two hosts: through TLS where there are keys, and an eye on the way."""

from __future__ import annotations

import errno
import os
import socket
import time

from ... import signals
from ...errors import PeerLost, ProtocolError
from ..network_channel import host_of, keep_alive, seconds_cut
from ..tls import Tls, speaks_tls
from .link import Link

_OFTEN = 1.0  # seconds between two looks at the connection


@signals.held_throughout
class NetworkLink(Link):
    """As every link; no descriptors go through it."""

    shares = False

    def __init__(self, connected: socket.socket, tls: Tls | None, greeting: bytes = b"") -> None:
        """Takes over the socket, which may still be connecting. ``greeting`` is said first."""
        super().__init__(connected)
        keep_alive(connected)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, True)
        self._tls = tls
        self._looked = time.monotonic()
        self._put(greeting)
        if tls is not None:
            self._put(tls.encrypted(b""))

    @property
    def host(self) -> str:  # type: ignore[override]
        """Where the other end is: the name in its certificate, or its address."""
        return (self._tls and self._tls.name) or host_of(self.socket)

    def stands(self) -> bool:
        """Whether it is connected.

        Raises:
            PeerLost: it will not be.
        """
        if code := self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise PeerLost(os.strerror(code))
        try:
            self.socket.getpeername()
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise PeerLost(str(error)) from error
            return False
        return True

    def _outgoing(self, raw: bytes) -> bytes:
        return raw if self._tls is None else self._tls.encrypted(raw)

    def _incoming(self, raw: bytes) -> bytes:
        if self._tls is None:
            if speaks_tls(raw) and not self._in:
                raise ProtocolError("the other end speaks TLS, and this end has no keys; both need keys= of one job")
            return raw
        try:
            return self._tls.decrypted(raw)
        finally:  # What TLS answers, an alert too.
            self._put(self._tls.encrypted(b""))
            self.flush()

    def _silent(self) -> None:
        if time.monotonic() - self._looked < _OFTEN:
            return
        self._looked = time.monotonic()
        if seconds := seconds_cut(self.socket):
            raise PeerLost(f"the link to {self.host} is cut: for {seconds:.1f} s nothing came back")
