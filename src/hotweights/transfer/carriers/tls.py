"""TLS: the flow of sockets, encrypted. Both ends prove first that they have a certificate of the same job.

The token goes before, unencrypted: it was told through TLS, is good once, and without a certificate is worth nothing.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from socket import socket
from typing import Any

from ...errors import PeerLost
from ..flow import Carrier, Waitable
from .sockets import SocketInflow, SocketOutflow


class TlsSocket(ssl.SSLSocket):
    """One that never blocks, as a plain socket that does not: what TLS waits for is a ``BlockingIOError``.

    Attributes:
        wants_write: whether it waits until it can be written to, else until there is something to read. While the ends
            prove who they are, a sender waits for words of the receiver, and the other way round.
    """

    wants_write: bool

    def sendmsg(self, buffers: Iterable[Any], *_: Any) -> int:  # type: ignore[override]
        """Send what the connection takes of these. Returns how many bytes that is."""
        sent = 0
        for view in buffers:
            start = 0
            while start < len(view):
                try:
                    count = self.send(view[start:])  # A record, at most.
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                    self.wants_write = isinstance(error, ssl.SSLWantWriteError)
                    if sent:
                        return sent
                    raise BlockingIOError from None
                self.wants_write = True
                start += count
                sent += count
        return sent

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        """Take what has come, a record at most."""
        try:
            count = super().recv_into(buffer, nbytes, flags)
            self.wants_write = False
            return count
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            self.wants_write = isinstance(error, ssl.SSLWantWriteError)
            raise BlockingIOError from None


def _encrypted(connected: socket, context: ssl.SSLContext | None, host: str | None) -> TlsSocket:
    """``host``: of the sender, at a receiver. Takes the socket over."""
    assert context is not None, "without keys no endpoint takes this carrier"
    context.sslsocket_class = TlsSocket
    try:
        made = context.wrap_socket(
            connected, server_side=host is None, server_hostname=host, do_handshake_on_connect=False
        )
    except OSError as error:
        connected.close()
        raise PeerLost(f"the connection for bytes is gone: {error}") from error
    assert isinstance(made, TlsSocket)
    made.wants_write = host is None
    return made


class TlsOutflow(SocketOutflow):
    """See ``Outflow``."""

    _context: ssl.SSLContext | None = None

    def protect(self, context: ssl.SSLContext) -> None:
        """How to prove who this is. Said before the receiver connects."""
        self._context = context

    def attach(self, connected: socket) -> None:
        """Take over the connection that showed the token."""
        super().attach(_encrypted(connected, self._context, None))

    @property
    def waiting(self) -> tuple[Waitable, bool] | None:
        """The connection, if there is one and something waits for it."""
        if super().waiting is None or not isinstance(self._socket, TlsSocket):
            return None
        return self._socket, self._socket.wants_write


class TlsInflow(SocketInflow):
    """See ``Inflow``."""

    _context: ssl.SSLContext | None = None
    _host = ""

    def protect(self, context: ssl.SSLContext, host: str) -> None:
        """How to prove who this is, and whom the sender's certificate must be for. Said before ``greet``."""
        self._context, self._host = context, host

    @property
    def awaited(self) -> tuple[Waitable, bool]:
        """The socket."""
        wants = self._socket.wants_write if isinstance(self._socket, TlsSocket) else self.greets
        return self._socket, wants

    def greet(self) -> bool:
        """Say to the sender which flow this is, and go on encrypted. Returns whether that is said."""
        if not super().greet():
            return False
        if not isinstance(self._socket, TlsSocket):
            self._socket = _encrypted(self._socket, self._context, self._host)
        return True


CARRIER = Carrier("tls", TlsOutflow, TlsInflow)
