"""Tiling: which rank holds which box of every tensor, the proof that the boxes are all of it, and who gives what."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from msgspec.structs import replace

from ...boxes import Box, row_major
from ...errors import UsageError
from ...manifest import TensorSpec
from ...ranges import Range, disjoint, pieces_of, range_of, shared, within
from ...sharding import Block, MeshLayout
from ...sources.dcp.pieces import Mosaic, PartBox, faults
from ...sources.dcp.saved import SavedPart, SavedTensor
from ...text import some
from .holding import BLOCKS, WHOLE, Table, TableRow
from .words import Patch, Task

_LONG = 64 * 1024  # bytes of one rank that are worth a chunk of their own; shorter ones are put together in the slot
_KEPT = 200_000  # chunks that are kept, of tensors that others are like
_CHOICES = 256  # of holders, for which the shares of a chunk are kept
_FAR = 1 << 60  # more bytes than any rank gives
_MANY = 64  # ranges of several runs that are chunks of their own: their ranks do it faster in fewer chunks,
_MORE = 100_000  # unless what they share must go by way of the rank that leads


class Holder(NamedTuple):
    """A rank that holds a box.

    Attributes:
        rank: in the group.
        place: of the tensor's row, among the rows of all tables that have it.
        at: the box's first index in the rank's tensor.
    """

    rank: int
    place: int
    at: tuple[int, ...]


class Tiles(NamedTuple):
    """The boxes of all tensors of one shape and one way to lie.

    Attributes:
        mosaic: the boxes, by their first byte.
        holders: of each of them.
        faults: why they are not all of such a tensor, with ``{}`` for its name.
        present: the ranks that hold some.
    """

    mosaic: Mosaic
    holders: tuple[tuple[Holder, ...], ...]
    faults: tuple[str, ...]
    present: tuple[int, ...]


class TiledTensor(NamedTuple):
    """A tensor, the tiles that it lies in, and the numbers of its rows by ``Holder.place``."""

    spec: TensorSpec
    tiles: Tiles
    rows: tuple[int, ...]


class Share(NamedTuple):
    """What one rank does for a chunk of any tensor that lies in the same tiles.

    Attributes:
        rank: which.
        places: ``Holder.place`` of each row of its table that the patches are of.
        patches: as a ``Task`` has them.
        nbytes: how many it gives.
    """

    rank: int
    places: tuple[int, ...]
    patches: tuple[Patch, ...]
    nbytes: int


class ChunkJob(NamedTuple):
    """A chunk of a slot, and which rank does what for it.

    Attributes:
        tensor: its number.
        range: the bytes.
        asking: the places of who wants it.
        shares: what each rank does.
        rows: as ``TiledTensor`` has them.
    """

    tensor: int
    range: Range
    asking: frozenset[int]
    shares: tuple[Share, ...]
    rows: tuple[int, ...]

    def task(self, share: Share, start: int, dtype: str = "", *, hashed: bool = False) -> Task:
        """What its rank is told, where the chunk begins at ``start``. Of what it makes alone it says the digest."""
        whole = len(self.shares) == 1
        # Most trainers have one table, and so one row of each tensor.
        rows = self.rows if len(self.rows) == 1 else tuple([self.rows[place] for place in share.places])
        return Task(start, rows, share.patches, hashed and whole, dtype, whole)


class Cut(NamedTuple):
    """A chunk of a tensor, of any that lies in the same tiles; and its boxes.

    ``shares`` are made once for each choice of holders: their number in ``Tiles.holders``, for each box. ``fixed`` are
    those of a chunk of which there are no copies.
    """

    range: Range
    asking: frozenset[int]
    boxes: tuple[PartBox, ...]
    fixed: tuple[Share, ...] | None
    shares: dict[tuple[int, ...], tuple[Share, ...]]


class Tiling:
    """All tensors of a version. The same for every version of a trainer that does not change.

    Attributes:
        tensors: in the order in which the lead holds them, and then the other ranks.
    """

    def __init__(self, tables: Sequence[Table], numbers: Sequence[int]) -> None:
        """``numbers``: of each rank, which table is its.

        Raises:
            UsageError: the boxes of all ranks are not all tensors; every problem is listed.
        """
        self._numbers, self._tables = numbers, tables
        self._rounded: dict[tuple[tuple[int, str], ...], Tiling] = {}
        self._known: dict[object, Tiles] = {}
        self._loads = [0] * len(numbers)
        self._many = _MANY
        self._cuts: dict[object, list[Cut]] = {}  # Most layers are alike, and so is what is wanted of them.
        self._kept = 0
        rows: dict[str, list[tuple[int, int, TableRow]]] = {}
        for number in dict.fromkeys(numbers):
            for place, row in enumerate(tables[number].rows):
                rows.setdefault(row.name, []).append((number, place, row))
        self._layouts = [table.layouts for table in tables]
        self._ranks = {number: [rank for rank, its in enumerate(numbers) if its == number] for number in set(numbers)}
        problems: list[str] = []
        self.tensors = [tile for name, own in rows.items() if (tile := self._tile(name, own, problems)) is not None]
        if problems:
            raise UsageError(f"the ranks do not hold whole tensors: {some(sorted(problems), 50)}")

    def specs(self) -> list[TensorSpec]:
        """What is offered."""
        return [tile.spec for tile in self.tensors]

    def rounded(self, dtypes: Mapping[int, str]) -> Tiling:
        """The same tensors, some in another dtype, by their numbers."""
        key = tuple(dtypes.items())
        if key not in self._rounded:
            names = {self.tensors[number].spec.name: dtype for number, dtype in key}
            tables = [
                replace(
                    table,
                    rows=tuple(replace(row, dtype=names[row.name]) if row.name in names else row for row in table.rows),
                )
                for table in self._tables
            ]
            self._rounded = {key: Tiling(tables, self._numbers)}  # Workers ask for the same each time.
        return self._rounded[key]

    def begin(self, far: Collection[int] = (), *, apart: bool = False) -> None:
        """Nobody has given anything yet. Who is ``far`` gives only what nobody else has: its bytes go twice.

        ``apart``: chunks are of one rank wherever that can be.
        """
        self._many = _MORE if apart else _MANY
        self._loads = [_FAR if rank in far else 0 for rank in range(len(self._numbers))]

    def jobs(self, number: int, requests: Sequence[tuple[int, tuple[Range, ...]]], limit: int) -> Iterator[ChunkJob]:
        """What is wanted of a tensor, each byte once, in chunks of at most ``limit`` bytes.

        Long boxes of one rank are chunks of their own, of several ranks in turn; what is short is put together.
        """
        tile = self.tensors[number]
        key = (id(tile.tiles), tuple(requests), limit, self._many)  # The tiles live as long as this.
        cuts = self._cuts.get(key)
        if cuts is None:
            cuts = list(_cuts(tile, requests, limit, self._many))
            if self._kept + len(cuts) > _KEPT:
                self._cuts, self._kept = {}, 0
            self._cuts[key], self._kept = cuts, self._kept + len(cuts)
        loads = self._loads
        for cut in cuts:
            shares = self._chosen(tile.tiles, cut) if cut.fixed is None else cut.fixed
            for share in shares:
                loads[share.rank] += share.nbytes
            yield ChunkJob(number, cut.range, cut.asking, shares, tile.rows)

    def _chosen(self, tiles: Tiles, cut: Cut) -> tuple[Share, ...]:
        """Who gives what: of copies, the rank that has given least. One that has all of the chunk gives all of it."""
        loads = self._loads
        able = [[holder.rank for holder in tiles.holders[box.number]] for box in cut.boxes]
        if has_all := set(able[0]).intersection(*able[1:]):
            one = min(has_all, key=lambda rank: (loads[rank], rank))
            choice = [ranks.index(one) for ranks in able]
        else:
            given: dict[int, int] = {}  # by what was chosen here
            choice = []
            for box, ranks in zip(cut.boxes, able, strict=True):
                rank = min(ranks, key=lambda rank: loads[rank] + given.get(rank, 0))
                given[rank] = given.get(rank, 0) + math.prod(box.lengths)
                choice.append(ranks.index(rank))
        chosen = tuple(choice)
        if (shares := cut.shares.get(chosen)) is None:
            if len(cut.shares) >= _CHOICES:
                cut.shares.clear()
            shares = cut.shares[chosen] = _shares(tiles, cut.boxes, chosen)
        return shares

    def _tile(self, name: str, own: Sequence[tuple[int, int, TableRow]], problems: list[str]) -> TiledTensor | None:
        kinds: dict[tuple[str, tuple[int, ...]], int] = {}
        for number, _, row in own:
            kinds.setdefault((row.dtype, row.shape), self._ranks[number][0])
        if len(kinds) > 1:
            said = [f"{dtype} {list(shape)} on rank {rank}" for (dtype, shape), rank in kinds.items()]
            problems.append(f"{name!r} is {' and '.join(said)}")
            return None
        dtype = getattr(torch, own[0][2].dtype)
        shape = own[0][2].shape
        key = (shape, dtype.itemsize, tuple((number, row.layout, row.blocks) for number, _, row in own))
        tiles = self._known.get(key)
        if tiles is None:
            tiles = self._known[key] = self._tiles(dtype, shape, [(number, row) for number, _, row in own])
        for fault in tiles.faults:
            ranks = some([str(rank) for rank in tiles.present]) or "no rank"
            problems.append(f"{fault.format(repr(name))}; of {len(self._numbers)} ranks it lies on {ranks}")
        return TiledTensor(TensorSpec(name, dtype, shape), tiles, tuple(place for _, place, _ in own))

    def _tiles(self, dtype: torch.dtype, shape: tuple[int, ...], own: Sequence[tuple[int, TableRow]]) -> Tiles:
        boxes: dict[SavedPart, list[Holder]] = {}
        present: dict[int, None] = {}
        for place, (number, row) in enumerate(own):
            for rank in self._ranks[number]:
                for block in self._blocks(number, row, rank, shape):
                    part = SavedPart(block.start, block.shape, None)
                    boxes.setdefault(part, []).append(Holder(rank, place, block.at))
                    present[rank] = None
        tensor = SavedTensor(dtype, shape, tuple(boxes))
        found = [fault.replace("{", "{{").replace("}", "}}") for fault in faults(_NAME, tensor)]
        wrong = tuple(fault.replace(repr(_NAME), "{}").replace("; was it saved by all ranks?", "") for fault in found)
        mosaic = Mosaic(tensor)
        return Tiles(mosaic, tuple(tuple(boxes[part]) for part in mosaic.parts), wrong, tuple(sorted(present)))

    def _blocks(self, number: int, row: TableRow, rank: int, shape: tuple[int, ...]) -> tuple[Block, ...]:
        if row.layout == BLOCKS:
            return row.blocks
        if row.layout == WHOLE:
            zeros = (0,) * len(shape)
            return () if 0 in shape else (Block(zeros, zeros, shape),)
        layout: MeshLayout = self._layouts[number][row.layout]
        return layout.blocks(shape, layout.ranks.index(rank)) if rank in layout.ranks else ()


_NAME = "\0"  # stands for a tensor's name


def _cut(tiles: Tiles, part: Range, asking: frozenset[int]) -> Cut:
    boxes = tuple(tiles.mosaic.cut(part)) if part.size else ()
    alone = all(len(tiles.holders[box.number]) == 1 for box in boxes)
    return Cut(part, asking, boxes, _shares(tiles, boxes, [0] * len(boxes)) if alone else None, {})


def _shares(tiles: Tiles, boxes: Sequence[PartBox], choice: Sequence[int]) -> tuple[Share, ...]:
    by_rank: dict[int, tuple[list[int], list[Patch]]] = {}
    for box, number in zip(boxes, choice, strict=True):
        holder, offsets = tiles.holders[box.number][number], tiles.mosaic.parts[box.number].offsets
        places, patches = by_rank.setdefault(holder.rank, ([], []))
        if holder.place not in places:
            places.append(holder.place)
        local = (*(at + b - o for at, b, o in zip(holder.at, box.begin, offsets, strict=False)), box.begin[-1])
        patches.append(Patch(places.index(holder.place), local, box.lengths, box.into, box.strides))
    return tuple(
        Share(
            rank,
            tuple(places),
            tuple(patches),
            sum(math.prod(patch.lengths) for patch in patches),
        )
        for rank, (places, patches) in by_rank.items()
    )


def _cuts(tile: TiledTensor, requests: Sequence[tuple[int, tuple[Range, ...]]], limit: int, many: int) -> Iterator[Cut]:
    everything = (Range(0, tile.spec.nbytes),)
    ranges = [ranges or everything for _, ranges in requests]
    wanted = [
        (part, frozenset(requests[place][0] for place in places), [ranges[place] for place in places])
        for part, places in shared(ranges)
    ]
    mosaic = tile.tiles.mosaic
    boxes = [list(mosaic.cut(part)) if part.size else [] for part, _, _ in wanted]
    if (own := _apart(mosaic, wanted, boxes, many)) is None:
        for part, asking, _ in wanted:
            for piece in pieces_of(part, limit):
                yield _cut(tile.tiles, piece, asking)
        return
    by_owner: dict[int, list[Cut]] = {}
    for (_, asking, _), cut, parts in zip(wanted, boxes, own, strict=True):
        for box, whole in zip(cut, parts, strict=True):
            pieces = (_cut(tile.tiles, part, asking) for part in pieces_of(whole, limit))
            by_owner.setdefault(box.number, []).extend(pieces)
    yield from _in_turn(list(by_owner.values()))


def _apart(
    mosaic: Mosaic,
    wanted: Sequence[tuple[Range, frozenset[int], list[tuple[Range, ...]]]],
    cut: list[list[PartBox]],
    many: int,
) -> list[list[Range]] | None:
    """The boxes of what is wanted as ranges, if each of them is one, and long, and receivers can tell them apart."""
    if all(len(boxes) <= 1 for boxes in cut):
        return None
    ranges = []
    for (_, _, requests), boxes in zip(wanted, cut, strict=True):
        if any(math.prod(box.lengths) < _LONG for box in boxes):
            return None
        own = [_range(mosaic, box) for box in boxes]
        fits = all(
            part is not None and all(any(within(part, asked) is not None for asked in request) for request in requests)
            for part in own
        )
        if not fits:
            return None
        ranges.append([part for part in own if part is not None])
    flat = [part for own in ranges for part in own]
    few = len(flat) <= many or all(part.count == 1 for part in flat)
    return ranges if few and disjoint(flat) else None


def _range(mosaic: Mosaic, box: PartBox) -> Range | None:
    first = sum(at * stride for at, stride in zip(box.begin, mosaic.strides, strict=True))
    return range_of(Box(torch.uint8, box.lengths, row_major(mosaic.shape), first))


def _in_turn(queues: Sequence[Iterable[Cut]]) -> Iterator[Cut]:
    """The first of each, the second of each, and so on."""
    waiting = [iter(queue) for queue in queues]
    while waiting:
        for queue in list(waiting):
            cut = next(queue, None)
            if cut is None:
                waiting.remove(queue)
            else:
                yield cut
