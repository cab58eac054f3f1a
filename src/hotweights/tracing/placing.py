"""Placing: operations that only put bytes of sources into other places are seen through, so that they cost no memory.

``cat``, ``stack``, ``clone`` and casts make results that consist of *tiles*, each a part of one source tensor. A copy
of such a result into the model becomes one copy for each tile: a stack of experts becomes one for each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from ..boxes import Box, Memory, Region, contiguous, narrowed, row_major
from ..plan.steps import Copy, Op

aten = torch.ops.aten


class Tile(NamedTuple):
    """A rectangular part of a result that holds bytes of one source.

    Attributes:
        start: its first index in the result.
        shape: its lengths there.
        source: the bytes that it holds.
        cast: the dtype that they are cast to, if they are.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    source: Region
    cast: torch.dtype | None


class Placing:
    """The results of a record that consist of tiles, in the order of the record."""

    def __init__(self, records: Iterable[Op]) -> None:
        self.changed = {region.memory for op in records for region in op.writes if region.memory.kind != "model"}
        """What operations write to, beside the model: it does not hold what it was made with."""
        self._results: dict[Memory, tuple[Box, list[Tile]]] = {}

    def see(self, op: Op) -> None:
        """Remember what the result of ``op`` consists of, if it consists of tiles."""
        make = _MAKERS.get(op.func)
        if make is None or len(op.results) != 1 or op.results[0].memory in self.changed:
            return
        tiles = make(self, op)
        if tiles is not None:
            self._results[op.results[0].memory] = (op.results[0].box, tiles)

    def copies(self, op: Op) -> list[Copy] | None:
        """The steps that do what ``op`` does, if it copies tiles into the model."""
        if op.func is not aten.copy_.default or op.writes[0].memory.kind != "model":
            return None
        destination, source = op.writes[0], op.args[1]
        tiles = self._tiles(source) if isinstance(source, Region) else None
        into = destination.box
        if tiles is not None and source.box.shape != into.shape:
            tiles = _reshaped(tiles, source.box, into.shape)
        if tiles is None or any(tile.cast not in (None, into.dtype) for tile in tiles):
            return None
        name = destination.memory.name
        return [
            Copy(tile.source.memory.name, name, tile.source.box, narrowed(into, tile.start, tile.shape))
            for tile in tiles
        ]

    def _tiles(self, region: Region) -> list[Tile] | None:
        if region.memory in self.changed:
            return None
        shape = region.box.shape
        if region.memory.kind == "source":
            return [Tile((0,) * len(shape), shape, region, None)]
        if region.memory not in self._results:
            return None
        box, tiles = self._results[region.memory]
        return tiles if box == region.box else _cut(box, tiles, region.box)

    def _cat(self, op: Op) -> list[Tile] | None:
        return self._joined(*_sequence(op), op.results[0].box, grows=False)

    def _stack(self, op: Op) -> list[Tile] | None:
        return self._joined(*_sequence(op), op.results[0].box, grows=True)

    def _joined(self, tensors: Sequence[Any], dim: int, box: Box, *, grows: bool) -> list[Tile] | None:
        """The tiles of all tensors, one behind the other in ``dim``, which is a new dimension if the result grows."""
        dim %= len(box.shape)
        joined: list[Tile] = []
        at = 0
        for tensor in tensors:
            tiles = self._tiles(tensor) if isinstance(tensor, Region) else None
            if tiles is None or tensor.box.dtype != box.dtype:
                return None  # Promotion.
            if not grows and len(tensor.box.shape) != len(box.shape):
                return None  # The empty tensors of one dimension that cat forgives.
            for tile in tiles:
                if grows:
                    tile = _grown(tile, dim)
                joined.append(tile._replace(start=(*tile.start[:dim], tile.start[dim] + at, *tile.start[dim + 1 :])))
            at += 1 if grows else tensor.box.shape[dim]
        return joined

    def _same(self, op: Op) -> list[Tile] | None:
        """A clone or a cast."""
        source = op.args[0]
        tiles = self._tiles(source) if isinstance(source, Region) else None
        dtype = op.results[0].box.dtype
        if tiles is None or dtype == source.box.dtype:
            return tiles
        if any(tile.cast is not None for tile in tiles):
            return None  # Two casts one after the other may round otherwise than one.
        return [tile._replace(cast=dtype) for tile in tiles]


_MAKERS: dict[Any, Callable[[Placing, Op], list[Tile] | None]] = {
    aten.cat.default: Placing._cat,
    aten.stack.default: Placing._stack,
    aten.clone.default: Placing._same,
    aten._to_copy.default: Placing._same,
}


def _sequence(op: Op) -> tuple[Sequence[Any], int]:
    """The tensors that ``cat`` or ``stack`` takes, and the dimension."""
    return op.args[0], op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)


def _reshaped(tiles: list[Tile], source: Box, shape: tuple[int, ...]) -> list[Tile] | None:
    """One contiguous tile in another shape; None for others."""
    tile = tiles[0] if tiles else None
    if tile is None or len(tiles) > 1 or source.numel != Box(source.dtype, shape, (), 0).numel:
        return None
    box = tile.source.box
    if not contiguous(box):
        return None
    box = Box(box.dtype, shape, row_major(shape), box.offset)
    return [Tile((0,) * len(shape), shape, Region(tile.source.memory, box), tile.cast)]


def _grown(tile: Tile, dim: int) -> Tile:
    """The tile with a dimension of one element more."""
    box = tile.source.box
    box = Box(box.dtype, (*box.shape[:dim], 1, *box.shape[dim:]), (*box.stride[:dim], 0, *box.stride[dim:]), box.offset)
    return Tile(
        (*tile.start[:dim], 0, *tile.start[dim:]),
        (*tile.shape[:dim], 1, *tile.shape[dim:]),
        Region(tile.source.memory, box),
        tile.cast,
    )


def _cut(box: Box, tiles: Iterable[Tile], wanted: Box) -> list[Tile] | None:
    """The tiles that make up a narrowed view of the result ``box``; None for views that are more than narrowed."""
    if box.dtype != wanted.dtype or box.stride != wanted.stride or not contiguous(box) or 0 in box.stride:
        return None
    start, rest = [], (wanted.offset - box.offset) // box.dtype.itemsize
    for stride in box.stride:
        at, rest = divmod(rest, stride)
        start.append(at)
    if any(at + length > whole for at, length, whole in zip(start, wanted.shape, box.shape, strict=True)):
        return None
    cut: list[Tile] = []
    for tile in tiles:
        low = tuple(max(a, b) for a, b in zip(start, tile.start, strict=True))
        high = tuple(min(a + n, b + m) for a, n, b, m in zip(start, wanted.shape, tile.start, tile.shape, strict=True))
        lengths = tuple(b - a for a, b in zip(low, high, strict=True))
        if all(length > 0 for length in lengths):
            inner = tuple(a - b for a, b in zip(low, tile.start, strict=True))
            source = Region(tile.source.memory, narrowed(tile.source.box, inner, lengths))
            begin = tuple(a - b for a, b in zip(low, start, strict=True))
            cut.append(Tile(begin, lengths, source, tile.cast))
    return cut
