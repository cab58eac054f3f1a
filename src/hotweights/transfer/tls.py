"""Tls: what one end of a connection sends and hears, encrypted, and proof of who the other end is. It has no socket."""

from __future__ import annotations

import contextlib
import datetime
import ssl
from typing import Any

from .. import signals
from ..errors import ProtocolError

_MOST = 256 * 1024  # bytes decrypted at once
_OTHER_NAME = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
_OF_TIME = (9, 10)  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
_LONGEST = 253  # characters of a host's name


@signals.held_throughout
class Tls:
    """TLS over memory: its owner moves the bytes. Mutual: each end proves that it has a certificate of the same job.

    Attributes:
        established: whether the other end has proven who it is.
        begun: whether the other end has said something that is TLS.
    """

    def __init__(self, context: ssl.SSLContext, *, server: bool, host: str | None = None) -> None:
        """``host``: whom a client wants to reach; of a server, for whom its certificate is, for errors."""
        self._came, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        wanted = None if server else host
        self._tls = context.wrap_bio(self._came, self._out, server_side=server, server_hostname=wanted)
        self._server, self._host = server, host
        self._waiting = bytearray()  # what is to be sent when the other end has proven who it is
        self.established = self.begun = False
        self._failed = False  # Nothing can be said through it any more, but for what it has to say of that.
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
        if self.established and not self._failed:
            self._tls.write(plain)
        elif not self.established:
            self._waiting += plain
        return self._out.read()

    def decrypted(self, raw: bytes) -> bytes:
        """What came, by what the socket had. Ask ``encrypted(b"")`` afterwards for what is to be answered.

        Raises:
            ProtocolError: the other end is no part of this job, or speaks no TLS.
        """
        self.begun = self.begun or speaks_tls(raw)
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
            self._failed = True
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
            advice = _ONE_JOB
            if error.verify_code in _OF_TIME:
                words += self._times_shown()
                advice = _RENEW if "expired" in words else _CLOCKS
            return f"the {other}'s certificate is not taken: {words}; {advice}"
        if "alert" in words:
            if "bad certificate" in words:  # What OpenSSL says of another name, and of one that is not yet valid.
                if not self._server:
                    return f"the {other} does not take this end's certificate: not yet valid by its clock; {_CLOCKS}"
                return (
                    f"the {other} does not take this end's certificate, and its own error says why: its address names "
                    f"this host otherwise than this end's key does, which is for {self._host}; put that name into the "
                    f"{other}'s address. Or by its clock the certificate is not yet valid; {_CLOCKS}"
                )
            advice = _RENEW if "expired" in words else _ONE_JOB
            return f"the {other} does not take this end's certificate: {words}; {advice}"
        if not self.established and "wrong version" in words:
            return f"the {other} speaks no TLS, or another version of it: {words}; {_ONE_JOB}"
        return f"TLS failed: {words}"

    def _names_shown(self) -> list[str]:
        """What the certificate that was refused is for, if that can be known."""
        names = [str(name) for _, name in self._shown().get("subjectAltName", ())]
        return [name for name in names if name.isprintable() and len(name) <= _LONGEST]

    def _times_shown(self) -> str:
        """From when until when it is valid, if that can be known, and what this host's clock says."""
        shown, now = self._shown(), datetime.datetime.now(datetime.UTC)
        times = f" (from {shown['notBefore']} to {shown['notAfter']})" if {"notBefore", "notAfter"} <= {*shown} else ""
        return f"{times}, by this host's clock, {now:%b %d %H:%M:%S %Y} GMT"

    def _shown(self) -> dict[str, Any]:
        """The certificate that was refused. Nobody has proven it: for errors."""
        with contextlib.suppress(Exception):  # ``ssl`` itself shows it in later versions of Python only.
            inner = getattr(self._tls, "_sslobj")  # noqa: B009
            return dict(inner.get_unverified_chain()[0].get_info())
        return {}


def speaks_tls(raw: bytes) -> bool:
    """Whether these are the first bytes of something that speaks TLS."""
    return raw[:1] in _TLS


_TLS = (b"\x15", b"\x16")  # how an alert and a handshake of TLS begin; no frame of ours does
_ONE_JOB = "both ends need keys= of one job"
_CLOCKS = "set the clocks of both hosts, and of the one where the key was made"
_RENEW = (
    "make another: remove HOST.pem from the directory of keys that has ca.key, then hotweights keys DIR --hosts HOST; "
    "and copy HOST.pem to that host"
)


def _of_another_name(names: list[str], host: str | None) -> str:
    """What to do where the sender has a key, and the address calls it otherwise."""
    known, shown = (f"{' or '.join(names)}, not", names[0]) if names else ("another name than", "that name")
    return (
        f"the sender's key is for {known} {host}, as the address calls it; put {shown} into the address at both ends, "
        f"or {host}, and make a key for it: hotweights keys DIR --hosts {host}"
    )
