"""Keys of one host as bytes, handed over by whoever has the authority's key. Nothing of them is left on a disk."""

from __future__ import annotations

import os
import ssl
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UsageError
from .keys import check_no_file, lacking, make_keys

_CA, _SECRET = "ca.pem", "ca.key"


@dataclass(frozen=True)
class HandedKeys:
    """The key and the certificate of one host, and whom it trusts. As ``Keys``, whatever the host is called."""

    authority: bytes
    host: bytes = field(repr=False)

    def serving(self, names: Sequence[str]) -> ssl.SSLContext:
        """How to answer whoever connects."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # Nobody resumes a session.
        return context

    def connecting(self, names: Sequence[str]) -> ssl.SSLContext:
        """How to connect."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=self.authority.decode("ascii"))
        # ``ssl`` reads a private key by a path only: this one is of memory that nobody else has.
        with os.fdopen(os.memfd_create("hotweights-key", os.MFD_CLOEXEC), "wb") as file:
            file.write(self.host)
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
        return context


class KeyChest:
    """The keys of a job in memory: those that a directory has, and where the authority's key is among them, any."""

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        """``files`` of a directory of keys by name; without any there is a new authority, whose key stays here.

        Raises:
            MissingPackage: ``cryptography`` is not installed.
        """
        self._files = dict(files or {})

    def keys_for(self, host: str) -> HandedKeys:
        """The keys of a host: those that there are, or new ones.

        Raises:
            UsageError: there are none, and none can be made.
            MissingPackage: ``cryptography`` is not installed.
        """
        name = f"{host}.pem"
        if name not in self._files:
            if self._files and _SECRET not in self._files:
                raise UsageError(
                    f"the sender's keys= has none for {host}, and no {_SECRET} to make one with; make it where that "
                    f"is: hotweights keys DIR --hosts {host}"
                )
            with tempfile.TemporaryDirectory(dir=_in_memory()) as folder:
                for path in (_CA, _SECRET):
                    if path in self._files:
                        (Path(folder) / path).write_bytes(self._files[path])
                make_keys(folder, [host])
                self._files |= files_of(folder)
        return HandedKeys(self._files[_CA], self._files[name])


def files_of(directory: str | os.PathLike[str]) -> dict[str, bytes]:
    """The files of a directory of keys, by name.

    Raises:
        UsageError: there are no keys, or they cannot be read.
    """
    check_no_file(Path(directory))
    try:
        found = {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.suffix in (".pem", ".key")}
    except OSError as error:
        raise UsageError(f"the keys in {directory} cannot be read: {error}") from error
    if _CA not in found:
        raise lacking(Path(directory))
    return found


def _in_memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
