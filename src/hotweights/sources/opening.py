"""Opening: whatever a caller may give as a source becomes an open one."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, overload

import torch
from torch import nn
from typing_extensions import TypeIs

from ..arguments import check_flags, check_kind, check_path
from ..errors import CheckpointError, UnknownName, UsageError
from ..manifest import Manifest
from ..names import bare_names
from ..rename import Rename, new_names
from ..shell import outer_names, renamed_inside
from .contracts import Source
from .dcp.place import dcp_place
from .dcp.source import DcpSource
from .files.shards import Paths
from .files.source import FileSource
from .iterator import IteratorSource
from .objects.address import (
    SCHEMES,
    Parts,
    check_store,
    connect,
    downloaded,
    is_store,
    no_address,
    parts_of,
    with_options,
    within,
)
from .objects.source import ObjectSource
from .pairs import Pair
from .readers.source import READERS, ReaderSource
from .renamed import renamed
from .state_dict import StateSource
from .versions import Version

# Also where a load or an update opens it, which have no option for it.
_LONGER = 'hotweights.open(address, store={"deadline": seconds}) waits longer'

AnySource = Paths | Mapping[str, torch.Tensor] | nn.Module | Source | IteratorSource


@contextmanager
def opened(
    source: AnySource,
    *,
    variant: str | None = None,
    subfolder: str | None = None,
    digests: str | os.PathLike[str] | None = None,
) -> Iterator[Source]:
    """The source, open. What is opened here is closed here; a source that was open stays open.

    An iterator that came without a manifest is read to its end: all of its tensors are in memory until this is left.
    The tensors of a module have the names that they have without wrappers, also where it is wrapped.
    """
    if (variant, subfolder) != (None, None) and not is_paths(source):
        raise _no_directory(source)
    if digests is not None and not is_paths(source):
        raise _no_files(source)
    if isinstance(source, Source):
        yield source
    elif isinstance(source, IteratorSource):
        with source.collect() as collected:
            yield collected
    else:
        with open(source, variant=variant, subfolder=subfolder, digests=digests) as fresh:
            yield renamed(fresh, _bare(source, fresh.manifest)) if isinstance(source, nn.Module) else fresh


def _bare(module: nn.Module, manifest: Manifest) -> dict[str, str]:
    """The names without wrappers, of those tensors that have no wrong one by then: one that another has."""
    outer = outer_names(manifest)
    names = dict.fromkeys(outer.values())
    bare = {name: pair[0] for name, pair in bare_names(module).items() if name in names}
    claims = Counter([*bare.values(), *(name for name in names if name not in bare)])
    return renamed_inside(outer, {name: new for name, new in bare.items() if claims[new] == 1})


def is_pairs(source: object) -> TypeIs[Iterable[Pair]]:
    """Whether it is a bare iterable of names and tensors, which ``opened`` does not take."""
    others = (str, Mapping, nn.Module, Source)
    return isinstance(source, Iterable) and not isinstance(source, others) and not is_paths(source)


def is_paths(source: object) -> TypeIs[Paths]:
    """Whether it is a path, or a list of paths."""
    if isinstance(source, (list, tuple)) and not isinstance(source, os.PathLike):  # As ``Version`` is.
        return bool(source) and all(isinstance(path, (str, os.PathLike)) for path in source)
    return isinstance(source, (str, os.PathLike))


def version_of(source: Source, version: str | int | None) -> str | int | None:
    """The version's name: what the caller said, or else what the source says."""
    said: str | int | None = getattr(source, "version", None) if version is None else version
    return said


def name_of(source: object, version: str | int | None) -> str | int | None:
    """The version's name: what the caller said, or else what ``follow`` calls what it gave."""
    return source.name if version is None and isinstance(source, Version) else version


@overload
def open(
    what: Paths,
    *,
    reader: Literal["hotweights"] = ...,
    variant: str | None = ...,
    subfolder: str | None = ...,
    digests: str | os.PathLike[str] | None = ...,
    store: object = ...,
    deadline: float | None = ...,
    cache_dir: str | os.PathLike[str] | None = ...,
) -> FileSource | DcpSource: ...
@overload
def open(
    what: Paths,
    *,
    reader: str,
    variant: str | None = ...,
    subfolder: str | None = ...,
    digests: str | os.PathLike[str] | None = ...,
    store: object = ...,
    deadline: float | None = ...,
    cache_dir: str | os.PathLike[str] | None = ...,
) -> FileSource | DcpSource | ReaderSource: ...
@overload
def open(what: Mapping[str, torch.Tensor] | torch.nn.Module, *, gather: bool = ...) -> StateSource: ...
@overload
def open(
    what: Paths | Mapping[str, torch.Tensor] | torch.nn.Module,
    *,
    variant: str | None = ...,
    subfolder: str | None = ...,
    digests: str | os.PathLike[str] | None = ...,
    store: object = ...,
    deadline: float | None = ...,
    cache_dir: str | os.PathLike[str] | None = ...,
) -> FileSource | DcpSource | StateSource: ...
@overload
def open(
    what: Paths | Mapping[str, torch.Tensor] | torch.nn.Module,
    *,
    reader: str = ...,
    rename: Rename | None,
    variant: str | None = ...,
    subfolder: str | None = ...,
    gather: bool = ...,
    digests: str | os.PathLike[str] | None = ...,
    store: object = ...,
    deadline: float | None = ...,
    cache_dir: str | os.PathLike[str] | None = ...,
) -> Source: ...
def open(
    what: Paths | Mapping[str, torch.Tensor] | torch.nn.Module,
    *,
    reader: str = "hotweights",
    rename: Rename | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    gather: bool = False,
    digests: str | os.PathLike[str] | None = None,
    store: object = None,
    deadline: float | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Source:
    """Open a source of weights. The caller closes it; use it in a ``with``.

    Args:
        what: a safetensors file, or a list of files; a directory, of which the files are taken that ``from_pretrained``
            takes, or one that ``torch.distributed.checkpoint`` has written; an index file; a snapshot in a hub cache,
            or its ``models--org--name`` directory; a mapping from names to tensors; or an ``nn.Module``, whose
            ``state_dict()`` is taken. A path may be an address in an object store or of the web,
            ``s3://bucket/model``, or on a hub, ``hf://org/name``: docs/objects.md.
        reader: which package reads the files. Ours gives any bytes in any order; ``"runai"``, ``"fastsafetensors"``,
            ``"safetensors"`` and ``"torch"`` (.bin, .pt, .pth) only stream.
        rename: new names for the tensors, see ``hotweights.load``.
        variant: which variant of the weights in the directory, such as ``"fp16"``: ``model.fp16.safetensors``.
        subfolder: the folder in the directory that holds the model, such as ``"transformer"`` of a pipeline; or a dict
            in a DCP checkpoint, such as ``"optim"``; by default its model's (docs/sources.md).
        gather: whether a mapping's or a module's DTensors are made whole, by their ``full_tensor()``: every rank must
            call this with the same tensors, and then holds all of them. Otherwise a rank's source has the rank's
            parts, which fit only a model that is sharded in the same way.
        digests: a file that says what the files hold: lines of ``sha256sum``, or what ``hotweights verify --write``
            makes. They are compared while they are read, by threads of their own, and at its end a stream, a load or an
            update waits for that. What differs is a ``CheckpointError`` there, which names each file or tensor and
            both digests.
        store: of an address: options of the store, such as ``{"endpoint": "http://localhost:9000"}``, of its client,
            and ``"deadline"`` and ``"requests"``. By default the variables that the cloud's own tools read. Or a store
            of obstore, or a file system of fsspec, in which the path lies; it stays yours, and open.
        deadline: of an address: seconds in which something of each request must come, all tries together; 60 by
            default.
        cache_dir: of an address: a directory of this host in which processes share what they read, so that each byte
            comes once; 100 GB at most, or ``store={"cache_nbytes": …}``.

    Raises:
        PlanError: ``rename`` gives two tensors one name.
        CheckpointError: the checkpoint is broken, every problem is listed; or the list of digests lacks a file.
        MissingPackage: the reader's package is not installed.
        UsageError: ``what`` is nothing of these; or ``variant`` or ``subfolder`` is given where no directory is.
    """
    source = _opened(what, reader, variant, subfolder, gather, digests, store, deadline, cache_dir)
    if rename is None:
        return source
    try:
        outer = outer_names(source.manifest)
        return renamed(source, renamed_inside(outer, new_names(dict.fromkeys(outer.values()), rename)))
    except BaseException:
        source.close()
        raise


def _opened(
    what: object,
    reader: str,
    variant: str | None,
    subfolder: str | None,
    gather: bool,
    digests: str | os.PathLike[str] | None,
    store: object,
    deadline: float | None,
    cache_dir: str | os.PathLike[str] | None,
) -> FileSource | DcpSource | ReaderSource | StateSource:
    if isinstance(what, Version):  # A tuple, but no list of paths.
        what = what.path
    if reader not in ("hotweights", *READERS):
        raise UnknownName("reader", reader, ("hotweights", *READERS))
    check_kind("variant", variant, str, 'the name of a variant, such as "fp16"')
    check_kind("subfolder", subfolder, str, "the name of a folder in the directory")
    check_kind("digests", digests, (str, os.PathLike), "the path of a list of digests")
    check_path(digests)
    check_flags(gather=gather)
    check_store(store)
    if gather and not isinstance(what, (Mapping, torch.nn.Module)):
        raise UsageError(f"gather= is for the DTensors of a mapping or a module; this is a {type(what).__name__}")
    if is_paths(what):
        paths = [os.fsdecode(path) for path in ([what] if isinstance(what, (str, os.PathLike)) else what)]
        addresses = [] if is_store(store) else _addresses(paths)
        if is_store(store) or addresses:
            if reader != "hotweights":
                raise UsageError(f"the reader {reader!r} reads files, no stores; leave reader= out for {paths[0]}")
            if addresses and addresses[0].scheme == "hf":
                found = downloaded(addresses, with_options(store, deadline=deadline), variant, subfolder)
                if found is not None:
                    return FileSource(found if len(found) > 1 else found[0], variant=variant, digests=digests)
            if is_store(store):
                places = within(store, paths, deadline=deadline, cache_dir=cache_dir)
            else:
                options = with_options(store, deadline=deadline, cache_dir=cache_dir)
                places = connect(addresses, options, longer=_LONGER)
            return ObjectSource(places, variant=variant, subfolder=subfolder, digests=digests)
        no_address(store=store, deadline=deadline, cache_dir=cache_dir)
        for path in paths:
            check_path(path)
        if isinstance(what, (str, os.PathLike)):
            _refuse_hub_name(os.fsdecode(what))
        if reader == "hotweights":
            if (place := dcp_place(what, subfolder)) is not None:
                if variant is not None:
                    raise UsageError(
                        f"variant= chooses among files; {place.directory} is a DCP checkpoint; leave it out"
                    )
                return DcpSource(place, digests)
            return FileSource(what, variant=variant, subfolder=subfolder, digests=digests)
        return ReaderSource(what, reader, variant=variant, subfolder=subfolder, digests=digests)
    no_address(store=store, deadline=deadline, cache_dir=cache_dir)
    if (variant, subfolder) != (None, None):
        raise _no_directory(what)
    if digests is not None:
        raise _no_files(what)
    if reader != "hotweights":
        raise UsageError(f"the reader {reader!r} reads files; this is a {type(what).__name__}")
    if isinstance(what, (Mapping, torch.nn.Module)):
        return StateSource(what, gather=gather)
    if isinstance(what, Source):
        raise UsageError(f"this {type(what).__name__} is an open source; use it as it is")
    if callable(getattr(what, "send", None)) and hasattr(what, "connected"):
        where = getattr(what, "address", "")
        raise UsageError(f"a {type(what).__name__} sends; what is loaded from is hotweights.Receiver({where!r})")
    raise UsageError(
        "a source is a path, a list of paths, a mapping of tensors, a module or an open source; this is a "
        f"{type(what).__name__}. An iterator of (name, tensor) goes through hotweights.from_iterator"
    )


def _no_directory(what: object) -> UsageError:
    return UsageError(
        f"variant= and subfolder= choose among the files of a directory; this is a {type(what).__name__}; leave them "
        "out"
    )


def _no_files(what: object) -> UsageError:
    cure = "open it with hotweights.open(path, digests=...)" if isinstance(what, Source) else "leave it out"
    return UsageError(f"digests= says what files hold; this is a {type(what).__name__}; {cure}")


def _addresses(texts: Sequence[str]) -> list[Parts]:
    """The addresses among the paths: all of one store, or none."""
    parts = [parts_of(text) for text in texts]
    addresses = [each for each in parts if each is not None]
    for text, each in zip(texts, parts, strict=True):
        if each is not None and each.scheme in ("unix", "tcps"):
            raise UsageError(f"{text}: this is the address of a sender; hotweights.Receiver({text!r}) is its source")
        if each is not None and each.scheme not in SCHEMES:
            place = f"{each.shown}/{each.key.partition('?')[0]}"  # What follows may be a secret.
            raise UsageError(
                f"{place}: addresses begin with {', '.join(f'{name}://' for name in SCHEMES)}; "
                "from other places download the files, and give the folder"
            )
    if addresses and len({each and each[:2] for each in parts}) > 1:
        raise UsageError("a list of addresses is of one store; open the others by themselves")
    return addresses


_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.safetensors)(?<!\.json)(?<!\.bin)(?<!\.pt)(?<!\.pth)")


def _refuse_hub_name(path: str) -> None:
    """``org/name`` is a name on a hub wherever no folder ``org`` lies. Nothing is ever downloaded here."""
    if _HUB_NAME.fullmatch(path) and not os.path.exists(path) and not os.path.isdir(os.path.dirname(path)):
        raise CheckpointError(
            f"{path}: there is no such file or directory. If it is a hub name: `hf download {path}`, then give the "
            f"folder that it prints; or read it from the hub: hf://{path}",
            cause="not_found",
        )
