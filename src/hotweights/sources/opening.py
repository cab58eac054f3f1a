"""Opening: whatever a caller may give as a source becomes an open one."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, overload

import torch
from torch import nn
from typing_extensions import TypeIs

from ..arguments import check_flags, check_kind
from ..errors import CheckpointError, UnknownName, UsageError
from ..names import bare_names
from ..rename import Rename, new_names
from .contracts import Source
from .files.shards import Paths
from .files.source import FileSource
from .iterator import IteratorSource
from .pairs import Pair
from .readers.source import READERS, ReaderSource
from .renamed import renamed
from .state_dict import StateSource

AnySource = Paths | Mapping[str, torch.Tensor] | nn.Module | Source | IteratorSource


@contextmanager
def opened(source: AnySource, *, variant: str | None = None, subfolder: str | None = None) -> Iterator[Source]:
    """The source, open. What is opened here is closed here; a source that was open stays open.

    An iterator that came without a manifest is read to its end: all of its tensors are in memory until this is left.
    The tensors of a module have the names that they have without wrappers, also where it is wrapped.
    """
    if (variant, subfolder) != (None, None) and not is_paths(source):
        raise _no_directory(source)
    if isinstance(source, Source):
        yield source
    elif isinstance(source, IteratorSource):
        with source.collect() as collected:
            yield collected
    else:
        with open(source, variant=variant, subfolder=subfolder) as fresh:
            yield renamed(fresh, _bare(source, fresh.manifest)) if isinstance(source, nn.Module) else fresh


def _bare(module: nn.Module, names: Collection[str]) -> dict[str, str]:
    """The names without wrappers, of those tensors that have no wrong one by then: one that another has."""
    bare = {name: pair[0] for name, pair in bare_names(module).items() if name in names}
    claims = Counter([*bare.values(), *(name for name in names if name not in bare)])
    return {name: new for name, new in bare.items() if claims[new] == 1}


def is_pairs(source: object) -> TypeIs[Iterable[Pair]]:
    """Whether it is a bare iterable of names and tensors, which ``opened`` does not take."""
    others = (str, Mapping, nn.Module, Source)
    return isinstance(source, Iterable) and not isinstance(source, others) and not is_paths(source)


def is_paths(source: object) -> TypeIs[Paths]:
    """Whether it is a path, or a list of paths."""
    if isinstance(source, (list, tuple)):
        return bool(source) and all(isinstance(path, (str, os.PathLike)) for path in source)
    return isinstance(source, (str, os.PathLike))


def version_of(source: Source, version: str | int | None) -> str | int | None:
    """The version's name: what the caller said, or else what the source says."""
    said: str | int | None = getattr(source, "version", None) if version is None else version
    return said


@overload
def open(
    what: Paths, *, reader: Literal["hotweights"] = ..., variant: str | None = ..., subfolder: str | None = ...
) -> FileSource: ...
@overload
def open(
    what: Paths, *, reader: str, variant: str | None = ..., subfolder: str | None = ...
) -> FileSource | ReaderSource: ...
@overload
def open(what: Mapping[str, torch.Tensor] | torch.nn.Module, *, gather: bool = ...) -> StateSource: ...
@overload
def open(
    what: Paths | Mapping[str, torch.Tensor] | torch.nn.Module,
    *,
    variant: str | None = ...,
    subfolder: str | None = ...,
) -> FileSource | StateSource: ...
@overload
def open(
    what: Paths | Mapping[str, torch.Tensor] | torch.nn.Module,
    *,
    reader: str = ...,
    rename: Rename | None,
    variant: str | None = ...,
    subfolder: str | None = ...,
    gather: bool = ...,
) -> Source: ...
def open(
    what: Paths | Mapping[str, torch.Tensor] | torch.nn.Module,
    *,
    reader: str = "hotweights",
    rename: Rename | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    gather: bool = False,
) -> Source:
    """Open a source of weights. The caller closes it; use it in a ``with``.

    Args:
        what: a safetensors file, or a list of files; a directory, of which the files are taken that ``from_pretrained``
            takes; an index file; a snapshot in a hub cache, or its ``models--org--name`` directory; a mapping from
            names to tensors; or an ``nn.Module``, whose ``state_dict()`` is taken.
        reader: which package reads the files. Ours gives any bytes in any order; ``"runai"``, ``"fastsafetensors"``,
            ``"safetensors"`` and ``"torch"`` (.bin, .pt, .pth) only stream.
        rename: new names for the tensors, see ``hotweights.load``.
        variant: which variant of the weights in the directory, such as ``"fp16"``: ``model.fp16.safetensors``.
        subfolder: the folder in the directory that holds the model, such as ``"transformer"`` of a pipeline.
        gather: whether a mapping's or a module's DTensors are made whole, by their ``full_tensor()``: every rank must
            call this with the same tensors, and then holds all of them. Otherwise a rank's source has the rank's
            parts, which fit only a model that is sharded in the same way.

    Raises:
        PlanError: ``rename`` gives two tensors one name.
        CheckpointError: the checkpoint is broken; every problem is listed.
        MissingPackage: the reader's package is not installed.
        UsageError: ``what`` is nothing of these; or ``variant`` or ``subfolder`` is given where no directory is.
    """
    source = _opened(what, reader, variant, subfolder, gather)
    try:
        return renamed(source, new_names(source.manifest, rename))
    except BaseException:
        source.close()
        raise


def _opened(
    what: object, reader: str, variant: str | None, subfolder: str | None, gather: bool
) -> FileSource | ReaderSource | StateSource:
    if reader not in ("hotweights", *READERS):
        raise UnknownName("reader", reader, ("hotweights", *READERS))
    check_kind("variant", variant, str, 'the name of a variant, such as "fp16"')
    check_kind("subfolder", subfolder, str, "the name of a folder in the directory")
    check_flags(gather=gather)
    if gather and not isinstance(what, (Mapping, torch.nn.Module)):
        raise UsageError(f"gather= is for the DTensors of a mapping or a module; this is a {type(what).__name__}")
    if is_paths(what):
        for path in [what] if isinstance(what, (str, os.PathLike)) else what:
            _refuse_address(os.fsdecode(path))
        if isinstance(what, (str, os.PathLike)):
            _refuse_hub_name(os.fsdecode(what))
        if reader == "hotweights":
            return FileSource(what, variant=variant, subfolder=subfolder)
        return ReaderSource(what, reader, variant=variant, subfolder=subfolder)
    if (variant, subfolder) != (None, None):
        raise _no_directory(what)
    if reader != "hotweights":
        raise UsageError(f"the reader {reader!r} reads files; this is a {type(what).__name__}")
    if isinstance(what, (Mapping, torch.nn.Module)):
        return StateSource(what, gather=gather)
    if isinstance(what, Source):
        raise UsageError(f"this {type(what).__name__} is an open source; use it as it is")
    raise UsageError(
        "a source is a path, a list of paths, a mapping of tensors, a module or an open source; this is a "
        f"{type(what).__name__}. An iterator of (name, tensor) goes through hotweights.from_iterator"
    )


def _no_directory(what: object) -> UsageError:
    return UsageError(
        f"variant= and subfolder= choose among the files of a directory; this is a {type(what).__name__}; leave them "
        "out"
    )


# Of three letters at least, so that no drive of Windows is one. Path() makes one slash of two.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?P<rest>[^/].*)", re.DOTALL)


def _refuse_address(path: str) -> None:
    """Object stores and the web cannot be read yet; the address is shown as it was before ``Path()`` took a slash."""
    address = _ADDRESS.fullmatch(path)
    if address is None or os.path.exists(path):
        return
    shown = f"{address[1]}://{address['rest']}"
    if address[1] in ("unix", "tcps"):
        raise UsageError(f"{path}: this is the address of a sender; hotweights.Receiver({path!r}) is its source")
    raise UsageError(
        f"{shown}: addresses of object stores and of the web cannot be opened by this version; download the files, and "
        "give the folder"
    )


_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.safetensors)(?<!\.json)(?<!\.bin)(?<!\.pt)(?<!\.pth)")


def _refuse_hub_name(path: str) -> None:
    """``org/name`` is a name on a hub wherever no folder ``org`` lies. Nothing is ever downloaded here."""
    if _HUB_NAME.fullmatch(path) and not os.path.exists(path) and not os.path.isdir(os.path.dirname(path)):
        raise CheckpointError(
            f"{path}: there is no such file or directory. If it is a hub name: `hf download {path}`, then give the "
            "folder that it prints"
        )
