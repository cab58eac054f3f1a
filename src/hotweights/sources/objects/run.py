"""Run: a place, in a store or on a disk, in which a trainer publishes versions, and the pointer to the last of them.

Each version is a folder that ``hotweights.open`` opens. ``latest.json`` names those that are kept. It is only ever
written over what its writer has read: of two trainers one is told. Nothing here knows tensors.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec

from ...errors import AddressTaken, CheckpointError, StoreError, UsageError
from ..files.writer import sync
from .address import SCHEMES, WRITTEN, Address, check_store, connect, is_store, parts_of, within

POINTER = "latest.json"
"""The object that names the versions."""
_FORMAT = "hotweights versions 1"
_LOCK = ".latest.lock"
_LARGEST = 2**63  # of numbers that JSON's readers agree on
_OURS = re.compile(r"\d{8,}-[A-Za-z0-9._-]*-[0-9a-f]{8}")
_DRAFT = re.compile(rf"\.{_OURS.pattern}\.[0-9a-f]{{8}}\.saving")  # what a process left that was killed
_PATIENCE = 10.0  # seconds for which another process of a directory may hold its lock: it writes one small file
_NEVER = {"e_tag": '"hotweights-was-never-here"'}

Tag = Mapping[str, str]
"""Which pointer was read: the mode of a ``put`` over it alone. Empty if there was none."""


class Published(msgspec.Struct, frozen=True):
    """A version that was published: its place in the order, its name, and the folder that it lies in."""

    number: int
    version: str | int
    folder: str


class Pointer(msgspec.Struct, frozen=True):
    """What ``latest.json`` holds.

    Attributes:
        format: what it is.
        sender: which sender wrote it; who writes it anew takes the place over.
        writing: random, so that no two are equal.
        versions: those that are kept, the newest last.
    """

    format: str
    sender: str
    writing: str
    versions: tuple[Published, ...] = ()

    @property
    def newest(self) -> Published | None:
        """The version that readers should have."""
        return self.versions[-1] if self.versions else None


def pointer(sender: str, versions: tuple[Published, ...]) -> Pointer:
    """A pointer that no other is equal to."""
    return Pointer(_FORMAT, sender, secrets.token_hex(8), versions)


def new_version(number: int, version: str | int) -> Published:
    """A version, in a folder that nobody else writes to.

    Raises:
        UsageError: the name cannot be written down.
    """
    if isinstance(version, int) and not -_LARGEST <= version < _LARGEST:
        raise UsageError(f"version={version}: a number of 64 bits at most can be published; give it as a str")
    if isinstance(version, str) and version.encode(errors="replace").decode() != version:
        raise UsageError(f"version={version!r}: no such text can be written down")
    words = re.sub(r"[^A-Za-z0-9._-]+", "_", str(version))[:64].strip("-._")
    return Published(number, version, f"{number:08}-{words}-{secrets.token_hex(4)}")


def is_run(address: object, store: object = None) -> bool:
    """Whether versions are published at this address, as files or objects, rather than sent to who connects."""
    if store is not None or isinstance(address, os.PathLike):
        return True
    scheme = address.partition(":")[0].lower() if isinstance(address, str) else ""
    return scheme in ("file", *SCHEMES)


def open_run(address: str | os.PathLike[str], store: object, deadline: float, *, writes: bool = False) -> Run:
    """The run at an address, or at a path; nothing is asked yet. The caller closes it.

    Raises:
        UsageError: it is no place of versions, or none that can be written to.
        MissingPackage: ``obstore`` is not installed.
    """
    check_store(store)
    text = os.fsdecode(address).rstrip("/")
    if is_store(store):
        (place,) = within(store, [text], writes=writes, deadline=deadline)
        return Run(_InStore(place), text, store)
    parts = None if isinstance(address, os.PathLike) else parts_of(text)
    if parts is not None and parts.scheme == "hf":
        raise UsageError(f"{text}: a commit on a hub never changes; open each revision by its address")
    if parts is None or parts.scheme not in SCHEMES:
        if store is not None:
            raise UsageError("store= is for addresses, such as s3://bucket/run; leave it out")
        return Run.of(_directory(text))
    if writes and parts.scheme not in WRITTEN:
        raise UsageError(
            f"{parts.shown}/...: versions can be published at {', '.join(f'{name}://' for name in WRITTEN)} and "
            "file://; the web is only read"
        )
    assert store is None or isinstance(store, Mapping)  # by ``check_store``
    options = {"deadline": deadline, **(store or {})}
    (place,) = connect([parts], options, writes=writes)
    return Run(_InStore(place), text, options)


def _directory(text: str) -> Path:
    path = unquote(text.removeprefix("file://")) if text.startswith("file:") else text
    if text.startswith("file:") and not path.startswith("/"):
        raise UsageError(f"{text}: a directory's address is file:// and its whole path, such as file:///mnt/run")
    return Path(path).expanduser()


class Run:
    """A place of versions. One thread at a time asks; any may close it."""

    def __init__(self, place: _InStore | _InDirectory, address: str | None, store: object) -> None:
        self._place = place
        self._store = store
        self.where = place.where
        self.path = str(place.where)
        self._given = self.path if address is None else address  # perhaps with a name and a password in it
        self.address = self._given if is_store(store) else self.path

    @classmethod
    def of(cls, directory: Path) -> Run:
        """Of a directory."""
        return cls(_InDirectory(directory), None, None)

    def read(self) -> tuple[Pointer | None, Tag]:
        """The pointer as it is now, and what writes over it. ``None`` if nothing was published here.

        Raises:
            CheckpointError: it is another's file, or damaged.
            StoreError: the store did not give it.
        """
        found = self._place.read()
        if found is None:
            return None, {}
        content, tag = found
        try:
            read = msgspec.json.decode(content, type=Pointer)
        except msgspec.DecodeError as error:
            raise CheckpointError(f"{self.path}/{POINTER}: no list of versions: {error}") from None
        if read.format != _FORMAT:
            raise CheckpointError(
                f"{self.path}/{POINTER}: is {read.format!r}; this hotweights reads {_FORMAT!r}, so one of both is older"
            )
        for each in read.versions:  # Whoever writes it decides what is opened, and deleted.
            if not _OURS.fullmatch(each.folder):
                raise CheckpointError(f"{self.path}/{POINTER}: {each.folder!r} is no folder of a version")
        return read, tag

    def write(self, new: Pointer, over: Tag) -> Tag:
        """Write the pointer, if nobody has since it was read. Returns what writes over it.

        Raises:
            AddressTaken: somebody has.
            StoreError: the store refused, or gave no answer; ``read`` tells then whether it was written all the same.
        """
        return self._place.write(msgspec.json.encode(new), over)

    def probe(self) -> None:
        """See that the store keeps conditions: without them two trainers write over each other's versions.

        Raises:
            StoreError: it does not.
        """
        self._place.probe()

    def target(self, version: Published) -> Path | Address:
        """Where ``hotweights.save`` writes a version."""
        return self._place.where / version.folder

    def source(self, version: Published) -> tuple[str, dict[str, Any]]:
        """What ``hotweights.open`` is given for a version: a path or an address, and options."""
        return f"{self._given}/{version.folder}", {} if self._store is None else {"store": self._store}

    def remove(self, folder: str) -> None:
        """Delete the folder of a version. Its readers get a ``CheckpointChanged``.

        Raises:
            StoreError, OSError: it could not be deleted, or not all of it.
        """
        assert _OURS.fullmatch(folder) or _DRAFT.fullmatch(folder)
        self._place.remove(folder)

    def folders(self) -> list[str]:
        """The folders of versions that lie here, published or not, and what a killed sender left."""
        return [name for name in self._place.names() if _OURS.fullmatch(name) or _DRAFT.fullmatch(name)]

    def close(self) -> None:
        """End every request and every wait. May be called twice."""
        self._place.close()

    def __repr__(self) -> str:
        return f"<Run at {self.path}>"


def _taken(where: Path | Address) -> AddressTaken:
    return AddressTaken(f"{where}: another sender publishes here, and began after this one; nothing was changed")


class _InStore:
    def __init__(self, where: Address) -> None:
        self.where = where
        self._key = (where / POINTER).key

    def read(self) -> tuple[bytes, Tag] | None:
        found = self.where.store.content(self._key)
        return None if found is None else (found[0], found[1].only_over)

    def write(self, content: bytes, over: Tag) -> Tag:
        refusal = self.where.store.put(self._key, content, dict(over) or "create")
        try:
            found = self.read()
        except StoreError as error:
            raise StoreError(f"{error}. Perhaps a version was published; the next send finds out") from None
        # Also where it was refused: the answer to a first try may have been lost, and a second one refused for that.
        if found is not None and found[0] == content:
            return found[1]
        if refusal is None or refusal.replaced:
            raise _taken(self.where)
        raise StoreError(f"{self.where}/{POINTER}: was not written; the store said: {refusal.answer}")

    def probe(self) -> None:
        content, tag = self.read() or (b"", {})
        never = {**_NEVER, **({"version": "1"} if "version" in tag else {})}
        refusal = self.where.store.put(self._key, content, never)
        if refusal is None or not tag:
            raise StoreError(
                f"{self.where}: this store ignores conditions (If-Match), so two trainers would write over each "
                "other's versions; save each one with hotweights.save, and tell the workers its address yourself"
            )
        if not refusal.replaced:
            raise StoreError(f"{self.where}/{POINTER}: the store did not take a condition: {refusal.answer}")

    def names(self) -> list[str]:
        return self.where.names()

    def remove(self, folder: str) -> None:
        # The index first: nobody opens what has lost some of its shards.
        for name in sorted((self.where / folder).names(), key=lambda name: not name.endswith(".json")):
            place = self.where / folder / name
            if (refusal := self.where.store.delete(place.key)) is not None:
                raise StoreError(f"{place}: was not deleted; the store said: {refusal.answer}")

    def close(self) -> None:
        self.where.store.close()


class _InDirectory:
    def __init__(self, where: Path) -> None:
        self.where = where

    def read(self) -> tuple[bytes, Tag] | None:
        try:
            content = (self.where / POINTER).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{self.where / POINTER}: cannot be read: {error.strerror}") from error
        return content, {"e_tag": hashlib.sha256(content).hexdigest()}

    def write(self, content: bytes, over: Tag) -> Tag:
        draft = self.where / f".{POINTER}.{secrets.token_hex(4)}"
        try:
            os.makedirs(self.where, exist_ok=True)
            with self._locked():
                found = self.read()
                if (found[1] if found else {}) != over:
                    raise _taken(self.where)
                draft.write_bytes(content)
                sync(draft)
                os.replace(draft, self.where / POINTER)
                sync(self.where)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise StoreError(f"{self.where / POINTER}: cannot be written: {error.strerror}") from error
        return {"e_tag": hashlib.sha256(content).hexdigest()}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = os.open(self.where / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        until = time.monotonic() + _PATIENCE
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise AddressTaken(f"{self.where / _LOCK}: another sender holds it") from None
                    time.sleep(0.01)
            yield
        finally:
            os.close(lock)

    def probe(self) -> None:
        pass

    def names(self) -> list[str]:
        return os.listdir(self.where)

    def remove(self, folder: str) -> None:
        for name in ("model.safetensors.index.json", "model.safetensors"):  # As in a store.
            with contextlib.suppress(FileNotFoundError):
                (self.where / folder / name).unlink()
        shutil.rmtree(self.where / folder)

    def close(self) -> None:
        pass
