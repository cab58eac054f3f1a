"""Range: which bytes of a tensor are asked for, and how what several ask for is cut. Arithmetic; it moves no byte."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from .boxes import Box, contiguous, extent

_RUN = 512  # bytes of a run from which runs are sent without what lies between them; see docs/decisions/0007
_GAP = 64 * 1024  # bytes that cost less to send than a part of their own does


class Range(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Runs of equal size at equal distances, in row-major order of the tensor: a slice of it, along any one dimension.

    Attributes:
        start: first byte within the tensor.
        nbytes: of each run.
        count: how many runs.
        stride: bytes from the beginning of one to that of the next; 0 where there is one.
    """

    start: int
    nbytes: int
    count: int = 1
    stride: int = 0

    @property
    def size(self) -> int:
        """Bytes of all runs."""
        return self.nbytes * self.count

    @property
    def stop(self) -> int:
        """The byte after the last."""
        return self.start + (self.count - 1) * self.stride + self.nbytes

    def fits(self, nbytes: int) -> bool:
        """Whether it is well formed and lies within a tensor of so many bytes."""
        if self.start < 0 or self.nbytes < 0 or self.count < 1 or self.stop > nbytes:
            return False
        return self.stride == 0 if self.count == 1 else 0 < self.nbytes < self.stride


def _grid(start: int, nbytes: int, count: int, stride: int) -> Range:
    """A range whose runs are joined where they touch."""
    return Range(start, nbytes * count) if count == 1 or nbytes == stride else Range(start, nbytes, count, stride)


# What a plan asks for.


def range_of(box: Box) -> Range | None:
    """The bytes of a box in its own order; ``None`` where that takes more than one distance between runs."""
    item = box.dtype.itemsize
    if contiguous(box):
        return Range(box.offset, box.nbytes)
    run, dims = item, [pair for pair in zip(box.shape, box.stride, strict=True) if pair[0] != 1]
    while dims and dims[-1][1] * item == run:
        run *= dims.pop()[0]
    length, stride = dims.pop()
    count = length
    while dims and dims[-1][1] == length * stride:
        length = dims.pop()[0]
        count, stride, length = count * length, stride, count * length
    return None if dims or stride * item <= run else _grid(box.offset, run, count, stride * item)


def ranges_of(boxes: Iterable[Box]) -> tuple[Range, ...]:
    """What must come so that these boxes of one tensor can be read: ascending, apart, and no more than pays."""
    found = {_coarse(box) for box in boxes}
    if len(found) == 1:
        return tuple(found)
    spans: list[list[int]] = []
    for one in sorted(found, key=lambda one: one.start):
        if spans and one.start <= spans[-1][1] + _GAP:
            spans[-1][1] = max(spans[-1][1], one.stop)
        else:
            spans.append([one.start, one.stop])
    return tuple(Range(start, stop - start) for start, stop in spans)


def _coarse(box: Box) -> Range:
    exact = range_of(box)
    if exact is not None and (exact.count == 1 or exact.nbytes >= _RUN):
        return exact
    start, stop = extent(box)
    return Range(start, stop - start)


# What several ask for.


def disjoint(ranges: Sequence[Range]) -> bool:
    """Whether no byte is in two of them. Runs among other runs are told apart only within one grid of columns."""
    if len(ranges) == 1:
        return True
    if all(one.count == 1 for one in ranges):
        ordered = sorted(ranges, key=lambda one: one.start)
        return all(one.stop <= other.start for one, other in itertools.pairwise(ordered))
    cells = _cells(ranges)
    return cells is not None and all(len(_asking(cell, cells)) == 1 for cell in cells)


def shared(requests: Sequence[tuple[Range, ...]]) -> list[tuple[Range, frozenset[int]]]:
    """Cut what several ask for of one tensor into pieces that each of them wants all or nothing of.

    Returns:
        Ascending pieces; of each the places in ``requests`` of those who want it. No byte is in two pieces, unless
        requests lie so oddly to each other that they cannot be cut alike: then each different one is a piece.
    """
    everybody = frozenset(range(len(requests)))
    if len(set(requests)) == 1:
        return [(one, everybody) for one in requests[0]]
    flat = [one for request in requests for one in request]
    cells = None if not any(one.size for one in flat) else _cells(flat)
    if cells is None:
        return [(one, frozenset(n for n in everybody if one in requests[n])) for one in sorted(set(flat), key=_start)]
    owners = [number for number, request in enumerate(requests) for _ in request]
    stride = next((one.stride for one in flat if one.count > 1), 0)
    found: list[tuple[_Cell, frozenset[int]]] = []
    for rows in _between(edge for cell in cells for edge in cell[:2]):
        for columns in _between(edge for cell in cells for edge in cell[2:]):
            asking = frozenset(_asking((*rows, *columns), cells))
            if asking:
                _append(found, (*rows, *columns), asking)
    return [
        (_grid(r0 * stride + c0, c1 - c0, r1 - r0, stride), frozenset(owners[place] for place in asking))
        for (r0, r1, c0, c1), asking in found
    ]


_Cell = tuple[int, int, int, int]  # first row, the row behind the last; first column, the column behind the last


def _start(one: Range) -> int:
    return one.start


def _cells(ranges: Sequence[Range]) -> list[_Cell] | None:
    """The ranges as rectangles of rows and columns (bytes); ``None`` where they have no rows in common."""
    strides = {one.stride for one in ranges if one.count > 1}
    if not strides:
        return [(0, 1, one.start, one.stop) for one in ranges]
    if len(strides) > 1:
        return None
    (stride,) = strides
    found = []
    for one in ranges:
        row, column = divmod(one.start, stride)
        if column + one.nbytes <= stride:
            found.append((row, row + one.count, column, column + one.nbytes))
        elif column == 0 and one.nbytes % stride == 0:
            found.append((row, row + one.nbytes // stride, 0, stride))
        else:
            return None
    return found


def _between(edges: Iterable[int]) -> Iterator[tuple[int, int]]:
    ordered = sorted(set(edges))
    yield from itertools.pairwise(ordered)


def _asking(cell: _Cell, cells: Sequence[_Cell]) -> list[int]:
    r0, r1, c0, c1 = cell
    return [n for n, (a0, a1, b0, b1) in enumerate(cells) if a0 < r1 and r0 < a1 and b0 < c1 and c0 < b1]


def _append(found: list[tuple[_Cell, frozenset[int]]], cell: _Cell, asking: frozenset[int]) -> None:
    """Add a cell, or widen the last one where it lies beside it and in the same ranges: a piece never spans two."""
    if found:
        (r0, r1, c0, c1), before = found[-1]
        if before == asking and (r0, r1, c1) == cell[:3]:
            found[-1] = (r0, r1, c0, cell[3]), asking
            return
    found.append((cell, asking))


def pieces_of(one: Range, limit: int) -> Iterator[Range]:
    """The range in pieces of at most ``limit`` bytes, ascending."""
    if one.size <= limit:
        yield one
    elif one.count == 1:
        for start in range(one.start, one.stop, limit):
            yield Range(start, min(limit, one.stop - start))
    elif rows := limit // one.nbytes:
        for row in range(0, one.count, rows):
            yield _grid(one.start + row * one.stride, one.nbytes, min(rows, one.count - row), one.stride)
    else:
        for row in range(one.count):
            yield from pieces_of(Range(one.start + row * one.stride, one.nbytes), limit)


def within(part: Range, whole: Range) -> Range | None:
    """Where bytes of ``part`` lie among those of ``whole``, written one behind the other; ``None`` if not all do."""
    if whole.count == 1:
        inside = whole.start <= part.start and part.stop <= whole.stop
        return Range(part.start - whole.start, part.nbytes, part.count, part.stride) if inside else None
    row, column = divmod(part.start - whole.start, whole.stride)
    same = part.count == 1 or part.stride == whole.stride
    if not same or row < 0 or row + part.count > whole.count or column + part.nbytes > whole.nbytes:
        return None
    return _grid(row * whole.nbytes + column, part.nbytes, part.count, whole.nbytes)
