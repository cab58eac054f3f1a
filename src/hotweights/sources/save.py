"""``save``: tensors to safetensors files, one in memory at a time, all or nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from ..arguments import check_choices, check_kind, check_path, nbytes_from
from ..dtypes import format_name, is_float
from ..errors import SaveError, UsageError
from ..manifest import TensorSpec
from ..memory.addresses import buffer
from ..memory.aliases import owners
from ..memory.digest import Digest, digest_of_bytes
from ..text import as_html, counts, size, table
from .contracts import Source
from .files.staging import Beside, Staging
from .files.writer import Writer, unwritable
from .iterator import from_iterator
from .narrowing import Narrowing, Overflow
from .objects.address import (
    WRITTEN,
    Address,
    check_store,
    connect,
    is_store,
    no_address,
    parts_of,
    with_options,
    within,
)
from .objects.upload import Upload
from .opening import AnySource, is_pairs, opened
from .pairs import Pair

_SHARD_NBYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What was saved.

    Attributes:
        path: the file or directory.
        files: the files of weights, and their index if there is one.
        nbytes: bytes of all tensors.
        tied: of a module, the names that were left out, and the name of the same tensor that was written.
        digest: of what was written, as it was in memory. ``hotweights verify`` reads the files and says theirs.
        seconds: how long it took.
        warnings: what a person should read: what a cast lost, or what failed when the new version was in its place.
    """

    path: str
    files: tuple[str, ...]
    nbytes: int
    tied: Mapping[str, str]
    digest: Digest
    seconds: float
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """All of it, for JSON."""
        return {
            **asdict(self),
            "files": list(self.files),
            "warnings": list(self.warnings),
            "digest": self.digest.as_dict(),
        }

    def __repr__(self) -> str:
        return f"<SaveReport {self._in_words()}>"

    def _repr_html_(self) -> str:
        return as_html(self)

    def _in_words(self) -> str:
        files = [file for file in self.files if not file.endswith(".json")]  # The index holds no bytes of these.
        return f"{len(self.digest.tensors)} tensors, {size(self.nbytes)} in {counts({'files': len(files)})}"

    def __str__(self) -> str:
        rows = [("saved", self._in_words())]
        rows += [("tied", f"{len(self.tied)} names of tensors that were written by another one")] if self.tied else []
        rows += [("digest", self.digest.whole), ("seconds", f"{self.seconds:.3f}")]
        return table([*rows, *(("warning", warning) for warning in self.warnings)])


def save(
    what: AnySource | Iterable[Pair],
    where: str | os.PathLike[str],
    *,
    shard_size: int | str | None = None,
    dtype: torch.dtype | None = None,
    overflow: Overflow = "error",
    metadata: Mapping[str, str] | None = None,
    beside: Beside = (),
    store: object = None,
    deadline: float | None = None,
) -> SaveReport:
    """Save tensors as safetensors: all of them, or nothing. One tensor is in memory at a time besides the source's own.

    The names are those of the source; a module's are those of its ``state_dict()``. Of a module's tied names the first
    is written; a mapping is written as it is. The files appear under their names when every byte is on the disk; if
    anything fails, what was there before is as it was. docs/ci.md says what readers see meanwhile.

    Args:
        what: a module, a mapping, a path, an open source, or an iterable of (name, tensor). An iterable without a
            manifest is kept in memory first; ``from_iterator(pairs, manifest)`` is not.
        where: a directory, or a file by a name that ends in ``.safetensors``. A checkpoint in the directory is
            replaced; its other files stay. An address in an object store is taken too: docs/objects.md.
        shard_size: bytes of one file at most, such as ``"5GB"``, the default; a larger tensor has a file of its own.
        dtype: what floats of 16 bits and more become. What a cast lost is counted in the report's warnings.
        overflow: what becomes of values beyond the largest of ``dtype``: ``"error"``, a ``SaveError`` with the number
            in each tensor, or ``"saturate"``, that largest value.
        metadata: free text for each file besides ``{"format": "pt"}``.
        beside: files that are copied into the directory, such as a ``config.json``; or a mapping from their names
            there, which may be ``"folder/name"``, to files. A new directory appears with them; in one that exists they
            follow the weights, and no other content of a file in a folder is replaced.
        store: of an address: options, or a store of obstore, see ``hotweights.open``.
        deadline: of an address: seconds in which a store must answer, all tries together; 60 by default.

    Raises:
        SaveError: the format cannot hold a tensor, or the files cannot be written.
        UsageError: the arguments make no sense together.
    """
    began = time.perf_counter()
    with _placed(where, store, deadline) as place:
        return _save(what, place, shard_size, _narrowing(dtype, overflow), metadata, beside, began)


def _save(
    what: AnySource | Iterable[Pair],
    place: Path | Address,
    shard_size: int | str | None,
    narrowing: Narrowing | None,
    metadata: Mapping[str, str] | None,
    beside: Beside,
    began: float,
) -> SaveReport:
    limit = _limit(shard_size, place)
    free_text = {"format": "pt", **_free_text(metadata or {})}
    with _opened(what) as (source, tied):
        specs = [spec if narrowing is None else narrowing.spec(spec) for spec in source.manifest.values()]
        if problems := [problem for spec in specs if (problem := unwritable(spec))]:
            raise SaveError(f"{place}: nothing was saved", problems)
        try:
            files, each, warnings = _write(source, specs, place, limit, free_text, beside, narrowing)
        except OSError as error:
            files_above = [folder for folder in _above(place) if folder.is_file()]
            why = f"{files_above[0]} is a file, no directory" if files_above else error.strerror or error
            raise SaveError(f"{place}: nothing was saved: {why}") from error
    return SaveReport(
        path=str(place),
        files=files,
        nbytes=sum(spec.nbytes for spec in specs),
        tied=tied,
        digest=Digest.of(each),
        seconds=time.perf_counter() - began,
        warnings=warnings,
    )


def _write(
    source: Source,
    specs: list[TensorSpec],
    place: Path | Address,
    limit: int,
    metadata: Mapping[str, str],
    beside: Beside,
    narrowing: Narrowing | None,
) -> tuple[tuple[str, ...], dict[str, str], tuple[str, ...]]:
    """Write all files. Returns their paths, the digest of each tensor, and warnings."""
    by_name = {spec.name: spec for spec in specs}
    shards = _dealt(specs, limit)
    # The stream is asked first: what it refuses is refused before anything is written.
    with source.leases() as stream, Upload(place) if isinstance(place, Address) else Staging(place) as staging:
        names, index = staging.names(len(shards))
        staging.take(beside, names)
        writers = [Writer(staging.folder / name, shard, metadata) for name, shard in zip(names, shards, strict=True)]
        home = {spec.name: writer for writer, shard in zip(writers, shards, strict=True) for spec in shard}
        digests: dict[str, str] = {}
        for lease in stream:
            with lease:
                spec = by_name[lease.name]
                if narrowing is None or lease.spec == spec:
                    raw = lease.raw.cpu().contiguous()
                else:
                    raw = narrowing.cast(lease.tensor, spec)
                digests[lease.name] = digest_of_bytes(spec, raw)
                home[lease.name].put(lease.name, buffer(raw.data_ptr(), raw.numel()))
        if narrowing is not None and narrowing.problems:  # Told together: a cast of a large model takes long.
            raise SaveError(f"{place}: nothing was saved: {narrowing.advice()}", narrowing.problems)
        for writer in writers:
            writer.finish()
        drafts, names = names, staging.settle(names) if index is not None else names
        if index is not None:
            settled = dict(zip(drafts, names, strict=True))
            weight_map = {name: settled[writer.path.name] for name, writer in home.items()}
            staging.write_index(index, weight_map, sum(spec.nbytes for spec in specs))
        staging.publish(names, index)
    files = (*names, index) if index is not None else tuple(names)
    warnings = (*(narrowing.warnings() if narrowing else ()), *staging.warnings)
    return tuple(str(place if staging.is_file else place / name) for name in files), digests, warnings


def _narrowing(dtype: torch.dtype | None, overflow: Overflow) -> Narrowing | None:
    check_choices(overflow=(overflow, Overflow))
    if dtype is None:
        return None
    if not (isinstance(dtype, torch.dtype) and is_float(dtype)):
        raise UsageError(f"dtype= is what floats become, a dtype of floats; found {dtype!r}")
    if format_name(dtype) in ("F8_E8M0", "F4"):
        raise UsageError(f"dtype={dtype} is no dtype that weights are cast to; a tool that quantises writes it")
    return Narrowing(dtype, overflow)


def _free_text(metadata: Mapping[str, str]) -> Mapping[str, str]:
    """``metadata``, which readers refuse a whole file for if any of it is no text."""
    check_kind("metadata", metadata, Mapping, "a mapping of texts")
    for pair in metadata.items():
        if not all(isinstance(text, str) and _is_utf8(text) for text in pair):
            raise UsageError(f"metadata= maps texts to texts, as the format has them; found {pair[0]!r}: {pair[1]!r}")
    return metadata


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


@contextmanager
def _placed(where: str | os.PathLike[str], store: object, deadline: float | None) -> Iterator[Path | Address]:
    if isinstance(where, Address):  # Its store is the caller's.
        yield where
        return
    if not isinstance(where, (str, os.PathLike, bytes)) or "\0" in os.fsdecode(where):
        raise UsageError(f"where= is the path of a directory, or of a file that ends in .safetensors; found {where!r}")
    text = os.fsdecode(where)
    check_store(store)
    parts = parts_of(text)
    if is_store(store):
        (address,) = within(store, [text], writes=True, deadline=deadline)
        try:
            yield address
        finally:
            address.store.close()
        return
    if parts is None:
        no_address(store=store, deadline=deadline)
        check_path(text)
        yield Path(text).expanduser()
        return
    if parts.scheme not in WRITTEN:
        raise UsageError(
            f"{parts.shown}/...: addresses that can be written to begin with "
            f"{', '.join(f'{name}://' for name in WRITTEN)}; save to a directory, and upload that"
        )
    (address,) = connect([parts], with_options(store, deadline=deadline), writes=True)
    try:
        yield address
    finally:
        address.store.close()


def _above(place: Path | Address) -> Sequence[Path]:
    return place.parents if isinstance(place, Path) else ()


def _limit(shard_size: int | str | None, place: Path | Address) -> int:
    if shard_size is None:
        return 2**63 if place.name.endswith(".safetensors") and not place.is_dir() else _SHARD_NBYTES
    limit = nbytes_from(shard_size=shard_size)
    if place.name.endswith(".safetensors") and not place.is_dir():
        raise UsageError(f"{place}: one file has no shards; with shard_size= name a directory")
    return limit


@contextmanager
def _opened(what: AnySource | Iterable[Pair]) -> Iterator[tuple[Source, dict[str, str]]]:
    """The source, and what is left out of it: a module's other names of tensors that are written already."""
    if isinstance(what, nn.Module):
        state = what.state_dict()
        tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
        tied = {name: owner for name, owner in owners(tensors).items() if name != owner}
        with opened({name: value for name, value in state.items() if name not in tied}) as source:
            yield source, tied
    elif is_pairs(what) and not hasattr(what, "collect"):
        with from_iterator(what) as pairs, pairs.collect() as source:
            yield source, {}
    else:
        with opened(what) as source:  # type: ignore[arg-type]
            yield source, {}


def _dealt(specs: list[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """The tensors of each file, in the source's order. There is a file, even if there are no tensors."""
    shards: list[list[TensorSpec]] = [[]]
    nbytes = 0
    for spec in specs:
        if shards[-1] and nbytes + spec.nbytes > limit:
            shards.append([])
            nbytes = 0
        shards[-1].append(spec)
        nbytes += spec.nbytes
    return shards
