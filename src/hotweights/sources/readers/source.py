"""ReaderSource: files that another package reads, checked against our manifest of them."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from ...dtypes import format_name
from ...errors import CheckpointError, Closed, HotweightsError, MissingPackage, SourceError, UnknownName
from ...manifest import Manifest
from ...memory.digest import Digest
from ...memory.digest import digests as tensor_digests
from ...memory.guards import Guard
from ...text import some
from ..closing import ClosedByOwner
from ..files.layout import SAFETENSORS
from ..files.shards import Checkpoint, Paths, open_checkpoint, path_of
from ..files.source import FileSource
from ..iterator import IteratorSource
from ..pairs import Pair
from ..streams import LeaseStream, digest_of_leases
from .reader import Reader


class _Package(NamedTuple):
    module: str  # what is imported
    name: str  # what is installed


_PACKAGES = {
    "fastsafetensors": _Package("fastsafetensors", "fastsafetensors"),
    "runai": _Package("runai_model_streamer", "runai-model-streamer"),
    "safetensors": _Package("safetensors", "safetensors"),
    "torch": _Package("torch", "torch"),
}
READERS = tuple(_PACKAGES)
"""The names that ``hotweights.open(path, reader=...)`` knows besides its own, ``"hotweights"``."""


class ReaderSource(ClosedByOwner):
    """The tensors of a checkpoint on disk, read by another package, in its order. Made by ``hotweights.open``.

    The manifest is read by hotweights from validated headers, and every tensor is checked against it. The files stay
    open: at the end of each stream they are compared with those that were opened.
    """

    def __init__(
        self,
        what: Paths,
        reader: str,
        *,
        variant: str | None = None,
        subfolder: str | None = None,
        digests: str | os.PathLike[str] | None = None,
    ) -> None:
        package = _import(reader)
        self.path = path_of(what)
        self.reader = reader
        self._checkpoint = open_checkpoint(what, package.layout, variant=variant, subfolder=subfolder)
        if self._checkpoint.several:  # The package streams each of them twice, in an order of its own.
            self._checkpoint.close()
            raise CheckpointError(
                f"{self.path}: {some(self._checkpoint.several, 3)} lie in several files, and the reader {reader!r} "
                'cannot take them from the one that the index names; reader="hotweights" can'
            )
        # Of safetensors our own reader compares digests of tensors; nothing else opens the others.
        ours = None if package.layout is SAFETENSORS else partial(_digest_of, package, self._checkpoint)
        self._checkpoint = self._checkpoint.proven(self.path, digests, ours)
        self._shards = self._checkpoint.shards
        self._closed = False
        self.manifest = Manifest(entry.spec for shard in self._shards for entry in shard.header.entries)
        self._homes = {entry.spec.name: shard.file.path for shard in self._shards for entry in shard.header.entries}
        self._strange = _strange(package, self._checkpoint)
        lent = _Reading(reader, package, self._checkpoint, self._strange, borrow=True)
        owned = _Reading(reader, package, self._checkpoint, self._strange, borrow=False)
        self._lent = IteratorSource(lent, self.manifest, borrowed=package.lends)
        self._owned = IteratorSource(owned, self.manifest, borrowed=not package.owns)

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of the checkpoint's files."""
        return tuple(shard.file.path for shard in self._shards)

    @property
    def metadata(self) -> dict[str, dict[str, str]]:
        """The free-text metadata of each file, by path."""
        return {shard.file.path: dict(shard.header.metadata) for shard in self._shards}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should read: signs that the files are of two versions, or that others are meant."""
        stead = (
            f"{os.path.basename(path)}: holds {some(dtypes, 3)}, which the reader {self.reader!r} does not know; "
            "hotweights reads this file in its stead"
            for path, dtypes in self._strange.items()
        )
        return (*self._checkpoint.warnings, *stead)

    def file_of(self, name: str) -> str:
        """The path of the file that holds the tensor."""
        return self._homes[name]

    def leases(self, *, guard: Guard = "off") -> LeaseStream:
        """Stream every tensor as a lease on the package's memory, in its order. See ``IteratorSource.leases``."""
        self._check_open()
        return self._lent.leases(guard=guard)

    def tensors(self) -> Iterator[Pair]:
        """Yield every tensor, the caller's to keep: a copy, unless the package gives tensors away."""
        self._check_open()
        return self._owned.tensors()

    def digest(self) -> Digest:
        """The digest of every tensor, which is that of a model with the same names and values. Reads every byte."""
        with self.leases() as stream:
            return digest_of_leases(stream)

    def check(self) -> None:
        """See that all files are those that were opened, and hold what ``digests`` says, see ``contracts.OnDisk``."""
        self._check_open()
        self._checkpoint.check()

    def close(self) -> None:
        """Close the files and every stream. May be called twice."""
        self._closed = True
        with ExitStack() as stack:  # The last is called first, and each is called, also if another fails.
            stack.callback(self._checkpoint.close)
            stack.callback(self._owned.close)
            stack.callback(self._lent.close)

    def __repr__(self) -> str:
        return f"<ReaderSource {self.path!r} by {self.reader}: {len(self.manifest)} tensors in {len(self.files)} files>"


def _digest_of(reader: Reader, checkpoint: Checkpoint, stopped: threading.Event) -> Digest:
    """The digest, for the proof, which ``check`` waits for: so this does not call that."""
    found: dict[str, str] = {}
    for name, tensor in reader.read([os.path.abspath(shard.file.path) for shard in checkpoint.shards], borrow=True):
        if stopped.is_set():
            raise Closed("the source was closed while its digest was made")
        found |= tensor_digests({name: tensor}, [name])
    return Digest.of(found)


def _strange(reader: Reader, checkpoint: Checkpoint) -> dict[str, list[str]]:
    """The files with dtypes that the package does not know, and these."""
    found = {
        os.path.abspath(shard.file.path): {format_name(entry.spec.dtype) for entry in shard.header.entries}
        for shard in checkpoint.shards
    }
    return {path: sorted(dtypes & reader.unknown) for path, dtypes in found.items() if dtypes & reader.unknown}


class _Reading(Iterable[Pair]):
    """The files, read from their beginning each time that this is iterated; ``strange`` ones by hotweights."""

    def __init__(
        self, name: str, reader: Reader, checkpoint: Checkpoint, strange: Container[str], *, borrow: bool
    ) -> None:
        self._name = name
        self._reader = reader
        self._checkpoint = checkpoint
        # A relative path would lead elsewhere after a chdir.
        paths = [os.path.abspath(shard.file.path) for shard in checkpoint.shards]
        self._paths = [path for path in paths if path not in strange]
        self._ours = [path for path in paths if path in strange]
        self._borrow = borrow

    def __iter__(self) -> Iterator[Pair]:
        self._checkpoint.begin()
        try:
            if self._paths:
                yield from self._reader.read(self._paths, borrow=self._borrow)
            for path in self._ours:
                with FileSource(path) as source:
                    yield from source.tensors()
        except HotweightsError:
            raise
        except Exception as error:
            self._checkpoint.check()  # If a file was cut or replaced, that is what went wrong, and is said.
            cure = '; reader="hotweights" reads every dtype of the format' if self._reader.layout is SAFETENSORS else ""
            raise SourceError(f"the reader {self._name!r} failed: {error}{cure}") from error
        self._checkpoint.check()


def _import(reader: str) -> Reader:
    if reader not in _PACKAGES:
        raise UnknownName("reader", reader, ("hotweights", *READERS))
    package = _PACKAGES[reader]
    try:
        known: Reader = importlib.import_module(f".{reader}", __package__).READER
    except ModuleNotFoundError as error:
        if error.name != package.module:  # The package is there, and lacks something itself.
            raise
        raise MissingPackage(package.name, reader) from error
    return known
