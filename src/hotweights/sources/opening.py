"""Opening: whatever a caller may give as a source becomes an open one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, overload

import torch
from torch import nn
from typing_extensions import TypeIs

from ..errors import CheckpointError, UnknownName, UsageError
from .contracts import Source
from .files.source import FileSource
from .iterator import IteratorSource, Pair
from .readers.source import READERS, ReaderSource
from .state_dict import StateSource

AnySource = str | os.PathLike[str] | Mapping[str, torch.Tensor] | nn.Module | Source | IteratorSource


@contextmanager
def opened(source: AnySource) -> Iterator[Source]:
    """The source, open. What is opened here is closed here; a source that was open stays open.

    An iterator that came without a manifest is read to its end: all of its tensors are in memory until this is left.
    """
    if isinstance(source, Source):
        yield source
    elif isinstance(source, IteratorSource):
        with source.collect() as collected:
            yield collected
    else:
        with open(source) as fresh:
            yield fresh


def is_pairs(source: object) -> TypeIs[Iterable[Pair]]:
    """Whether it is a bare iterable of names and tensors, which ``opened`` does not take."""
    return isinstance(source, Iterable) and not isinstance(source, (str, Mapping, nn.Module, Source))


def version_of(source: Source, version: str | int | None) -> str | int | None:
    """The version's name: what the caller said, or else what the source says."""
    said: str | int | None = getattr(source, "version", None) if version is None else version
    return said


@overload
def open(what: str | os.PathLike[str], *, reader: Literal["hotweights"] = ...) -> FileSource: ...
@overload
def open(what: str | os.PathLike[str], *, reader: str) -> FileSource | ReaderSource: ...
@overload
def open(what: Mapping[str, torch.Tensor] | torch.nn.Module, *, gather: bool = ...) -> StateSource: ...
@overload
def open(
    what: str | os.PathLike[str] | Mapping[str, torch.Tensor] | torch.nn.Module,
) -> FileSource | StateSource: ...
def open(
    what: str | os.PathLike[str] | Mapping[str, torch.Tensor] | torch.nn.Module,
    *,
    reader: str = "hotweights",
    gather: bool = False,
) -> FileSource | ReaderSource | StateSource:
    """Open a source of weights. The caller closes it; use it in a ``with``.

    Args:
        what: a safetensors file; a directory with ``model.safetensors.index.json``, or with files and no index; an
            index file; a snapshot in a hub cache, or its ``models--org--name`` directory; a mapping from names to
            tensors; or an ``nn.Module``, whose ``state_dict()`` is taken.
        reader: which package reads the files. Ours gives any bytes in any order; ``"runai"``, ``"fastsafetensors"``,
            ``"safetensors"`` and ``"torch"`` (.bin, .pt, .pth) only stream.
        gather: whether a mapping's or a module's DTensors are made whole, by their ``full_tensor()``: every rank must
            call this with the same tensors, and then holds all of them. Otherwise a rank's source has the rank's
            parts, which fit only a model that is sharded in the same way.

    Raises:
        CheckpointError: the checkpoint is broken; every problem is listed.
        MissingPackage: the reader's package is not installed.
        UsageError: ``what`` is nothing of these.
    """
    if reader not in ("hotweights", *READERS):
        raise UnknownName("reader", reader, ("hotweights", *READERS))
    if gather and not isinstance(what, (Mapping, torch.nn.Module)):
        raise UsageError(f"gather= is for the DTensors of a mapping or a module; this is a {type(what).__name__}")
    if isinstance(what, (str, os.PathLike)):
        _refuse_hub_name(os.fsdecode(what))
        return FileSource(what) if reader == "hotweights" else ReaderSource(what, reader)
    if reader != "hotweights":
        raise UsageError(f"the reader {reader!r} reads files; this is a {type(what).__name__}")
    if isinstance(what, (Mapping, torch.nn.Module)):
        return StateSource(what, gather=gather)
    if isinstance(what, Source):
        raise UsageError(f"this {type(what).__name__} is an open source; use it as it is")
    raise UsageError(
        f"a source is a path, a mapping of tensors, a module or an open source; this is a {type(what).__name__}. An "
        "iterator of (name, tensor) goes through hotweights.from_iterator"
    )


_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.safetensors)(?<!\.json)(?<!\.bin)(?<!\.pt)(?<!\.pth)")


def _refuse_hub_name(path: str) -> None:
    """``org/name`` is a name on a hub wherever no folder ``org`` lies. Nothing is ever downloaded here."""
    if _HUB_NAME.fullmatch(path) and not os.path.exists(path) and not os.path.isdir(os.path.dirname(path)):
        raise CheckpointError(
            f"{path}: there is no such file or directory. If it is a hub name: `hf download {path}`, then give the "
            "folder that it prints"
        )
