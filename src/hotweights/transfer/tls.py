"""Tls: what one end of a connection sends and hears, encrypted, and proof of who the other end is. It has no socket."""

from __future__ import annotations

import contextlib
import ssl

from .. import signals
from ..errors import ProtocolError

_MOST = 256 * 1024  # bytes decrypted at once
_OTHER_NAME = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
_LONGEST = 253  # characters of a host's name


@signals.held_throughout
class Tls:
    """TLS over memory: its owner moves the bytes. Mutual: each end proves that it has a certificate of the same job.

    Attributes:
        established: whether the other end has proven who it is.
    """

    def __init__(self, context: ssl.SSLContext, *, server: bool, host: str | None = None) -> None:
        """``host``: whom a client wants to reach; of a server, for whom its certificate is, for errors."""
        self._came, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        wanted = None if server else host
        self._tls = context.wrap_bio(self._came, self._out, server_side=server, server_hostname=wanted)
        self._server, self._host = server, host
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
            if error.verify_code in _OTHER_NAME:
                return _of_another_name(self._names_shown(), self._host)
            advice = _RENEW if "expired" in words else _ONE_JOB
            return f"the {other}'s certificate is not taken: {words}; {advice}"
        if "alert" in words:
            if self._server and "bad certificate" in words:  # What OpenSSL says of another name. Not of another job.
                return (
                    f"the {other}'s address names this host otherwise than this end's key does, which is for "
                    f"{self._host}; put that name into the {other}'s address"
                )
            advice = _RENEW if "expired" in words else _ONE_JOB
            return f"the {other} does not take this end's certificate: {words}; {advice}"
        if not self.established and "wrong version" in words:
            return f"the {other} speaks no TLS, or another version of it: {words}; {_ONE_JOB}"
        return f"TLS failed: {words}"

    def _names_shown(self) -> list[str]:
        """What the certificate that was refused is for, if that can be known. Nobody has proven it: for errors."""
        with contextlib.suppress(Exception):  # ``ssl`` itself shows it in later versions of Python only.
            inner = getattr(self._tls, "_sslobj")  # noqa: B009
            shown = dict(inner.get_unverified_chain()[0].get_info())
            names = [str(name) for _, name in shown.get("subjectAltName", ())]
            return [name for name in names if name.isprintable() and len(name) <= _LONGEST]
        return []


_ONE_JOB = "both ends need keys= of one job"
_RENEW = "make another: remove HOST.pem from the directory of keys, then hotweights keys DIR --hosts HOST"


def _of_another_name(names: list[str], host: str | None) -> str:
    """What to do where the sender has a key, and the address calls it otherwise."""
    known, shown = (f"{' or '.join(names)}, not", names[0]) if names else ("another name than", "that name")
    return (
        f"the sender's key is for {known} {host}, as the address calls it; put {shown} into the address at both ends, "
        f"or {host}, and make a key for it: hotweights keys DIR --hosts {host}"
    )
