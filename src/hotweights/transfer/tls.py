"""Tls: what one end of a connection sends and hears, encrypted, and proof of who the other end is. It has no socket."""

from __future__ import annotations

import ssl

from .. import signals
from ..errors import ProtocolError

_MOST = 256 * 1024  # bytes decrypted at once


@signals.held_throughout
class Tls:
    """TLS over memory: its owner moves the bytes. Mutual: each end proves that it has a certificate of the same job.

    Attributes:
        established: whether the other end has proven who it is.
    """

    def __init__(self, context: ssl.SSLContext, *, server: bool, host: str | None = None) -> None:
        """``host``: whom a client wants to reach."""
        self._came, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._came, self._out, server_side=server, server_hostname=host)
        self._server = server
        self._waiting = bytearray()  # what is to be sent when the other end has proven who it is
        self.established = False
        if not server:
            self._step()

    @property
    def name(self) -> str:
        """Of the other end, by its certificate; empty before it is established."""
        certificate = self._tls.getpeercert() if self.established else None
        names = dict(part[0] for part in (certificate or {}).get("subject", ()) if part)  # type: ignore[misc]
        return str(names.get("commonName", ""))

    def encrypted(self, plain: bytes) -> bytes:
        """What to send now, for these bytes and for whatever else the protocol has to say."""
        if self.established:
            self._tls.write(plain)
        else:
            self._waiting += plain
        return self._out.read()

    def decrypted(self, raw: bytes) -> bytes:
        """What came, by what the socket had. Ask ``encrypted(b"")`` afterwards for what is to be answered.

        Raises:
            ProtocolError: the other end is no part of this job, or speaks no TLS.
        """
        self._came.write(raw)
        plain = bytearray()
        try:
            if not self.established and not self._step():
                return b""
            while part := self._tls.read(_MOST):
                plain += part
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            raise ProtocolError(self._reason(error)) from error
        return bytes(plain)

    def _step(self) -> bool:
        """Go on with the handshake. Returns whether it is done."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        self.established = True
        if self._waiting:
            self._tls.write(bytes(self._waiting))
            self._waiting.clear()
        return True

    def _reason(self, error: ssl.SSLError) -> str:
        words = getattr(error, "verify_message", "") or (error.reason or str(error)).lower().replace("_", " ")
        other = "receiver" if self._server else "sender"
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"the {other}'s certificate is not taken: {words}; both ends need keys= of one job"
        if "alert" in words:
            return f"the {other} does not take this end's certificate: {words}; both ends need keys= of one job"
        if not self.established and "wrong version" in words:
            return f"the {other} speaks no TLS, or another version of it: {words}; both ends need keys= of one job"
        return f"TLS failed: {words}"
