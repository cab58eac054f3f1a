"""Register: where the decision about an update is written once, in a directory that all hosts see."""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec

from .. import signals
from ..errors import TransferError, UsageError
from .decision import Decision

_NAME = "hotweights-{:016x}.json"  # by update


class DecisionRecord(NamedTuple):
    """What was decided about an update, and for which places of the sender's."""

    decision: Decision
    places: tuple[int, ...]


@signals.held_throughout
class Register:
    """A directory in which a file is made once for each update: whoever is first decides, and all others read that.

    By ``link``, which fails if there is such a file, on NFS too. Nothing is removed: a member that stood still for an
    hour must find what was decided.
    """

    def __init__(self, url: str) -> None:
        """Nothing is looked up yet.

        Raises:
            UsageError: it is no ``file:///DIRECTORY``.
        """
        parts = urlsplit(url) if isinstance(url, str) else None
        if parts is None or parts.scheme != "file" or parts.netloc or not os.path.isabs(parts.path):
            raise UsageError(f"decision= is a directory that all hosts see, as file:///shared/run; found {url!r}")
        self.url = url
        self._directory = unquote(parts.path)

    def probe(self) -> None:
        """See that the second of two writers is refused.

        Raises:
            UsageError: the directory is not there, or not writable, or lets both write.
        """
        path = os.path.join(self._directory, f"hotweights-probe-{secrets.token_hex(8)}")
        try:
            first = self._written(path, b"first")
            second = self._written(path, b"second")
        except OSError as error:
            raise UsageError(f"{self.url} cannot hold decisions: {error}") from error
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)
        if (first, second) != (b"first", b"first"):
            raise UsageError(f"{self.url} cannot hold decisions: it let two writers write one file")

    def decide(self, update: int, record: DecisionRecord) -> DecisionRecord:
        """Write ``record`` if nothing is written about this update. Returns what is written then.

        Raises:
            TransferError: the directory cannot be reached, or what is there is no record.
        """
        content = msgspec.json.encode({"decision": record.decision.name, "places": record.places})
        try:
            raw = self._written(os.path.join(self._directory, _NAME.format(update)), content)
            found = msgspec.json.decode(raw, type=_Content)
            return DecisionRecord(Decision[found.decision], found.places)
        except (OSError, msgspec.MsgspecError, KeyError) as error:
            raise TransferError(f"the decision about update {update} cannot be had from {self.url}: {error}") from error

    def _written(self, path: str, content: bytes) -> bytes:
        """What lies at the path, which is ``content`` if nothing lay there before."""
        beside = f"{path}.{secrets.token_hex(8)}"
        try:
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # Else a host that loses power might forget what others have done.
            with contextlib.suppress(OSError):  # Lost answers of NFS, too: what lies there counts.
                os.link(beside, path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(beside)
        with open(path, "rb") as file:
            return file.read()


class _Content(msgspec.Struct, forbid_unknown_fields=True):
    decision: str
    places: tuple[int, ...]


def register_of(url: str) -> Register:
    """The register at a URL.

    Raises:
        UsageError: there is no such kind of register.
    """
    return Register(url)


class SharedRecord(NamedTuple):
    """The decision about one update, for the member with one place."""

    register: Register
    update: int
    place: int

    def is_commit(self) -> bool:
        """Whether this member is to take the version. If nothing is decided yet, it is decided now that nobody does.

        Raises:
            TransferError: the register cannot be reached.
        """
        record = self.register.decide(self.update, DecisionRecord(Decision.ABORT, ()))
        return record.decision is Decision.COMMIT and self.place in record.places
