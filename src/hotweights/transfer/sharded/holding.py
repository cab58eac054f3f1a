"""Holding: what one trainer rank holds of a version, and the table that says so to the rank that leads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn
from xxhash import xxh3_128_digest

from ...arguments import shown
from ...errors import UsageError
from ...model.as_saved import as_saved
from ...rename import Rename, new_names
from ...sharding import Block, MeshLayout
from ...sources.contracts import InMemory, Source
from ...sources.opening import AnySource, is_pairs, opened
from ...sources.pairs import pairs_of
from ...sources.state_dict import check_whole
from ...text import some
from ..messages import described, word_of
from ..unwritten import watching
from .group_place import NEW, GroupPlace, place_in
from .shard import Shard

WHOLE, BLOCKS = -1, -2

CastTo = torch.dtype | Callable[[str], torch.dtype | None]
"""As what floating-point tensors are sent: a dtype, or a function from a tensor's name to one, or to ``None``."""

Sharded = AnySource | Iterable[tuple[str, torch.Tensor] | Shard]


class TableRow(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A tensor of which a rank holds something.

    Attributes:
        name: of the whole tensor.
        dtype: as torch spells it.
        shape: of the whole tensor.
        layout: the number of its layout; ``WHOLE`` if all of it lies here, ``BLOCKS`` if these blocks do.
        blocks: of a declared box.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: int = WHOLE
    blocks: tuple[Block, ...] = ()


class Table(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """What a rank holds. Ranks that run the same program with the same mesh have the same one: it travels once."""

    layouts: tuple[MeshLayout, ...]
    rows: tuple[TableRow, ...]

    def digest(self) -> bytes:
        """The same for equal tables."""
        return xxh3_128_digest(msgspec.msgpack.encode(self))


class Holding(NamedTuple):
    """What this rank holds.

    Attributes:
        table: what it is; a row for each tensor.
        tensors: this rank's own, in the order of the rows. They are their owner's.
        dtypes: as which they are sent.
        written: names those that were written since.
    """

    table: Table
    tensors: Sequence[torch.Tensor]
    dtypes: Sequence[torch.dtype]
    written: Callable[[], list[str]]


def said_of(held: Holding | UsageError, group: Any, place: GroupPlace) -> tuple[bytes, str]:
    """The digest of what a rank holds, or why it cannot send."""
    try:
        if place_in(group) != place:
            return b"", f"its process group is not the one of its Sender any more; {NEW}"
    except UsageError as error:
        return b"", f"{error}; {NEW}"
    return (b"", str(held)) if isinstance(held, UsageError) else (held.table.digest(), "")


@contextmanager
def holding(
    tensors: object, rename: Rename | None, ranks: Sequence[int], dtype: CastTo | None = None
) -> Iterator[Holding]:
    """What a rank holds of these.

    Args:
        tensors: a mapping, a module, or pairs and ``Shard``s.
        rename: new names.
        ranks: the group's, as the meshes of DTensors number them.
        dtype: as what floating-point tensors are sent.

    Raises:
        UsageError: they cannot be sent.
    """
    state, shards = _split(tensors)
    with opened(state) as source:
        if not isinstance(source, InMemory):
            raise UsageError(
                f"with group= each rank sends tensors that lie in its memory; this is a {type(source).__name__}. Leave "
                "group= out, and send it from one process"
            )
        yield _listed(source, shards, rename, ranks, cast_by(dtype))


def cast_by(dtype: CastTo | None) -> Callable[[str, torch.dtype], torch.dtype]:
    """As which dtype the tensor of a name is sent. Numbers that are no floats, or that are of one byte, stay.

    Raises:
        UsageError: it is no dtype of floating-point numbers, nor a function that gives some.
    """
    if dtype is not None and not callable(dtype):
        _check_float(dtype)

    def sent(name: str, own: torch.dtype) -> torch.dtype:
        if not own.is_floating_point or own.itemsize == 1:
            return own
        asked = dtype(name) if callable(dtype) else dtype
        if asked is None:
            return own
        _check_float(asked)
        return asked

    return sent


def _check_float(dtype: object) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize == 1:
        raise UsageError(
            f"dtype= is float32, bfloat16 or the like, or a function from a name to one or None; found {shown(dtype)}"
        )


def _split(tensors: object) -> tuple[Mapping[str, torch.Tensor] | nn.Module | Source, list[Shard]]:
    """What a state dict can hold, and the boxes beside it."""
    if isinstance(tensors, nn.Module):
        _refuse_fsdp1(tensors)
        tensors = as_saved(tensors)
    if isinstance(tensors, Shard):
        raise UsageError("send takes several: [hotweights.Shard(...), ...]")
    if isinstance(tensors, Mapping):
        tensors = tensors.items()
    elif not is_pairs(tensors):
        return tensors, []  # type: ignore[return-value]
    shards: list[Shard] = []
    state: dict[str, torch.Tensor] = {}
    twice = []
    for item in tensors:
        if isinstance(item, Shard):
            shards.append(item)
            continue
        ((name, tensor),) = pairs_of([item])
        if name in state:
            twice.append(name)
        elif (inside := _shards_of(name, tensor)) is not None:
            shards += inside
        else:
            state[name] = tensor
    if twice := sorted({*twice, *(shard.name for shard in shards if shard.name in state)}):
        raise UsageError(f"two tensors have one name: {some(twice)}")
    return state, shards


def _shards_of(name: str, tensor: Any) -> list[Shard] | None:
    """The boxes of a ShardedTensor, of which FSDP1's sharded state dict consists; ``None`` if it is something else."""
    module = sys.modules.get("torch.distributed._shard.sharded_tensor")
    if module is None or not isinstance(tensor, module.ShardedTensor):
        return None
    shape = tuple(tensor.size())
    return [
        Shard(name, local.tensor, offset=tuple(local.metadata.shard_offsets), shape=shape)
        for local in tensor.local_shards()
    ]


def _refuse_fsdp1(model: nn.Module) -> None:
    """Its ``state_dict()`` would gather, and do so on all ranks or hang."""
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if module is None or not any(isinstance(part, module.FullyShardedDataParallel) for part in model.modules()):
        return
    raise UsageError(
        "FSDP1 gathers a model's state_dict(); send its sharded one, made on every rank:\n"
        "    with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):\n"
        "        state = model.state_dict()"
    )


def _listed(
    source: Source,
    shards: Sequence[Shard],
    rename: Rename | None,
    ranks: Sequence[int],
    cast: Callable[[str, torch.dtype], torch.dtype],
) -> Holding:
    assert isinstance(source, InMemory)
    here = {rank: number for number, rank in enumerate(ranks)}
    manifest = source.manifest
    check_whole(type(manifest)(spec for spec in manifest.values() if spec.shell))
    problems = [
        f"{name!r} is a DTensor ({spec.part}), and {spec.part.problem}"
        for name, spec in manifest.items()
        if spec.part is not None and spec.part.problem
    ]
    layouts: dict[MeshLayout, int] = {}
    names = new_names(dict.fromkeys((*manifest, *(shard.name for shard in shards))), rename)
    rows: list[TableRow] = []
    described(manifest)  # It refuses what torch has no type for.
    dtypes: list[torch.dtype] = []
    for name, spec in manifest.items():
        part, shape = spec.part, spec.shape
        assert isinstance(spec.dtype, torch.dtype)
        dtypes.append(cast(names[name], spec.dtype))
        dtype = word_of(dtypes[-1])
        if part is None:
            rows.append(TableRow(names[name], dtype, shape))
            continue
        if part.layout is None:
            continue
        if strangers := sorted(set(part.layout.ranks) - here.keys()):
            problems.append(f"{name!r} is a DTensor ({part}), and its mesh has ranks {strangers}, not in group=")
            continue
        number = layouts.setdefault(part.layout, len(layouts))
        rows.append(TableRow(names[name], dtype, part.shape, number))
    for shard in shards:
        dtypes.append(cast(names[shard.name], shard.tensor.dtype))
        dtype = word_of(dtypes[-1])
        blocks = (shard.block,) if shard.tensor.numel() else ()
        rows.append(TableRow(names[shard.name], dtype, shard.shape, BLOCKS, blocks))
    if problems:
        raise UsageError(f"these cannot be sent: {some(sorted(problems), 50)}")
    ours = (msgspec.structs.replace(layout, ranks=tuple(here[rank] for rank in layout.ranks)) for layout in layouts)
    held = [source.borrow(name) for name in manifest] + [shard.tensor.detach() for shard in shards]
    named = [(row.name, tensor) for row, tensor in zip(rows, held, strict=True)]
    return Holding(Table(tuple(ours), tuple(rows)), held, dtypes, watching(lambda: named))
