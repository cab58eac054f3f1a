"""Copies: tensors that several ranks hold, and whether they are equal: each rank says a digest of many at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from xxhash import xxh3_64

from ...memory.addresses import buffer
from ..copying import flat, parts
from .holding import Holding
from .tiling import Tiles, Tiling

_STEP = 4 * 1024 * 1024  # bytes of a tensor with holes that are copied to be hashed


class Twins(NamedTuple):
    """Tensors that lie on ranks in the same way.

    Attributes:
        names: of the tensors.
        rows: of each rank's table, for one tensor after the other.
        alike: ranks that hold the same of them, and so the same values.
    """

    names: tuple[str, ...]
    rows: Mapping[int, tuple[tuple[int, ...], ...]]
    alike: tuple[tuple[int, ...], ...]


def twins_of(tiling: Tiling) -> list[Twins]:
    """All tensors of which some part lies on several ranks. There are few kinds of them, in however many tensors."""
    kinds: dict[int, tuple[Tiles, list[str], list[tuple[int, ...]]]] = {}
    for tensor in tiling.tensors:
        _, names, rows = kinds.setdefault(id(tensor.tiles), (tensor.tiles, [], []))
        names.append(tensor.spec.name)
        rows.append(tensor.rows)
    return [twins for tiles, names, rows in kinds.values() if (twins := _twins(tiles, names, rows)) is not None]


def _twins(tiles: Tiles, names: Sequence[str], rows: Sequence[tuple[int, ...]]) -> Twins | None:
    held: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
    places: dict[int, dict[int, None]] = {}
    for number, holders in enumerate(tiles.holders):
        for holder in holders:
            held.setdefault(holder.rank, []).append((number, holder.at))
            places.setdefault(holder.rank, {})[holder.place] = None
    classes: dict[tuple[object, ...], list[int]] = {}
    for rank, boxes in held.items():
        classes.setdefault((*boxes,), []).append(rank)
    alike = tuple(tuple(ranks) for ranks in classes.values() if len(ranks) > 1)
    if not alike:
        return None
    made: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {}  # Most ranks have one table: their rows are the same.
    by_rank = {}
    for rank in (rank for ranks in alike for rank in ranks):
        own = tuple(places[rank])
        if own not in made:
            made[own] = tuple(tuple(row[place] for place in own) for row in rows)
        by_rank[rank] = made[own]
    return Twins(tuple(names), by_rank, alike)


def digests_of(held: Holding, groups: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """A digest of each group of rows, by their bytes; of those on a device another kind, which is negative."""
    return tuple(_digest(held.tensors[row].to(held.dtypes[row]) for row in rows) for rows in groups)


def _digest(tensors: Iterable[torch.Tensor]) -> int:
    hasher, on_device = xxh3_64(), False
    for tensor in tensors:
        plain = flat(tensor)
        if not plain.is_cpu:
            on_device = True
            hasher.update(_sum(plain).to_bytes(8, "little", signed=True))
            continue
        for _, part in parts(plain, _STEP) if plain.numel() else ():
            whole = part.contiguous()
            hasher.update(buffer(whole.data_ptr(), whole.nbytes))
    return -1 - hasher.intdigest() if on_device else hasher.intdigest()


def _sum(plain: torch.Tensor) -> int:
    """Of all bytes, as numbers; made where they lie, for they would take long to the host."""
    words = plain.view(torch.int32) if plain.dtype is torch.uint8 and plain.numel() % 4 == 0 else plain
    return int(torch.view_as_real(words).sum().item() if words.is_complex() else words.sum(dtype=torch.int64).item())


def unequal(twins: Twins, digests: Mapping[int, int]) -> list[list[int]]:
    """Ranks that hold the same of these tensors, with other values; those with the same ones together."""
    for ranks in twins.alike:
        said: dict[int, list[int]] = {}
        for rank in ranks:
            said.setdefault(digests[rank], []).append(rank)
        for kind in ([digest for digest in said if digest < 0], [digest for digest in said if digest >= 0]):
            if len(kind) > 1:
                return [said[digest] for digest in kind]
    return []
