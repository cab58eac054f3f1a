"""Range: which bytes of a tensor are asked for, and how to cut what several ask for. Arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from .boxes import Box, contiguous, extent, joined

_RUN = 512  # bytes; of shorter runs also what lies between them is sent, see docs/decisions/0007
_GAP = 64 * 1024  # bytes between two spans that cost less to send than a second span does


class Range(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Bytes of a row-major tensor: runs of equal size at equal distances. A slice along one dimension is such.

    Attributes:
        start: first byte within the tensor.
        nbytes: bytes of each run.
        count: how many runs.
        stride: bytes from the start of a run to that of the next; 0 where there is only one.
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
        """The byte after the last one."""
        return self.start + (self.count - 1) * self.stride + self.nbytes

    def fits(self, nbytes: int) -> bool:
        """Whether it is well formed, and lies within a tensor of ``nbytes`` bytes."""
        if self.start < 0 or self.nbytes < 0 or self.count < 1 or self.stop > nbytes:
            return False
        return self.stride == 0 if self.count == 1 else 0 < self.nbytes < self.stride


def _grid(start: int, nbytes: int, count: int, stride: int) -> Range:
    """The range of these runs; they are joined where they touch."""
    return Range(start, nbytes * count) if count == 1 or nbytes == stride else Range(start, nbytes, count, stride)


def scaled(part: Range, times: int, by: int) -> Range:
    """The same elements, where each has ``times / by`` as many bytes."""
    start, nbytes, stride = (number * times // by for number in (part.start, part.nbytes, part.stride))
    return Range(start, nbytes, part.count, stride)


# What a plan asks for.


def range_of(box: Box) -> Range | None:
    """The bytes of a box, in its own order; ``None`` where its runs do not all lie at one distance."""
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
    """What must be sent so that these boxes of one tensor can be read: ascending and apart.

    Bytes that nobody needs are in it where leaving them out would cost more than sending them.
    """
    coarse = {_coarse(box) for box in boxes}
    if len(coarse) == 1:
        return tuple(coarse)
    spans = joined(((span.start, span.stop) for span in coarse), _GAP)
    return tuple(Range(start, stop - start) for start, stop in spans)


def _coarse(box: Box) -> Range:
    exact = range_of(box)
    if exact is not None and (exact.count == 1 or exact.nbytes >= _RUN):
        return exact
    start, stop = extent(box)
    return Range(start, stop - start)


# What several ask for.


def disjoint(ranges: Sequence[Range]) -> bool:
    """Whether no byte is in two of them. Ranges of several runs must have one stride; else the answer is no."""
    if len(ranges) == 1:
        return True
    if all(run.count == 1 for run in ranges):
        ordered = sorted(ranges, key=_start)
        return all(run.stop <= following.start for run, following in itertools.pairwise(ordered))
    if (cells := _cells(ranges)) is None:
        return False
    above: list[_Cell] = []  # those that reach into the row
    for cell in sorted(cells):
        above = [other for other in above if other[1] > cell[0]]
        if any(b0 < cell[3] and cell[2] < b1 for _, _, b0, b1 in above):
            return False
        above.append(cell)
    return True


def shared(requests: Sequence[tuple[Range, ...]]) -> list[tuple[Range, frozenset[int]]]:
    """Cut what several ask for of one tensor into pieces, so that each of them wants all of a piece or nothing of it.

    Returns:
        Ascending pieces, each with the places in ``requests`` of those who want it. No byte is in two pieces; but where
        the requests have no rows in common, they are not cut, and each different range is a piece.
    """
    everybody = frozenset(range(len(requests)))
    if len(set(requests)) == 1:
        return [(piece, everybody) for piece in requests[0]]
    flat = [asked for request in requests for asked in request]
    cells = None if not any(asked.size for asked in flat) else _cells(flat)
    if cells is None:
        distinct = sorted(set(flat), key=_start)
        return [(asked, frozenset(n for n in everybody if asked in requests[n])) for asked in distinct]
    owners = [number for number, request in enumerate(requests) for _ in request]
    stride = next((asked.stride for asked in flat if asked.count > 1), 0)
    wanted: list[tuple[_Cell, frozenset[int]]] = []
    for rows in _between(edge for cell in cells for edge in cell[:2]):
        for columns in _between(edge for cell in cells for edge in cell[2:]):
            asking = frozenset(_asking((*rows, *columns), cells))
            if asking:
                _append(wanted, (*rows, *columns), asking)
    return [
        (_grid(r0 * stride + c0, c1 - c0, r1 - r0, stride), frozenset(owners[place] for place in asking))
        for (r0, r1, c0, c1), asking in wanted
    ]


_Cell = tuple[int, int, int, int]  # first row, the row behind the last; first column, the column behind the last


def _start(asked: Range) -> int:
    return asked.start


def _cells(ranges: Sequence[Range]) -> list[_Cell] | None:
    """The ranges as rectangles of rows and columns (bytes); ``None`` where they have no rows in common."""
    strides = {asked.stride for asked in ranges if asked.count > 1}
    if not strides:
        return [(0, 1, asked.start, asked.stop) for asked in ranges]
    if len(strides) > 1:
        return None
    (stride,) = strides
    cells = []
    for asked in ranges:
        row, column = divmod(asked.start, stride)
        if column + asked.nbytes <= stride:
            cells.append((row, row + asked.count, column, column + asked.nbytes))
        elif column == 0 and asked.nbytes % stride == 0:
            cells.append((row, row + asked.nbytes // stride, 0, stride))
        else:
            return None
    return cells


def _between(edges: Iterable[int]) -> Iterator[tuple[int, int]]:
    ordered = sorted(set(edges))
    yield from itertools.pairwise(ordered)


def _asking(cell: _Cell, cells: Sequence[_Cell]) -> list[int]:
    r0, r1, c0, c1 = cell
    return [n for n, (a0, a1, b0, b1) in enumerate(cells) if a0 < r1 and r0 < a1 and b0 < c1 and c0 < b1]


def _append(wanted: list[tuple[_Cell, frozenset[int]]], cell: _Cell, asking: frozenset[int]) -> None:
    """Add a cell; or widen the last one if it ends where this one begins and the same ask for it."""
    if wanted:
        (r0, r1, c0, c1), before = wanted[-1]
        if before == asking and (r0, r1, c1) == cell[:3]:
            wanted[-1] = (r0, r1, c0, cell[3]), asking
            return
    wanted.append((cell, asking))


def pieces_of(whole: Range, limit: int) -> Iterator[Range]:
    """The range in pieces of at most ``limit`` bytes, ascending."""
    if whole.size <= limit:
        yield whole
    elif whole.count == 1:
        for start in range(whole.start, whole.stop, limit):
            yield Range(start, min(limit, whole.stop - start))
    elif rows := limit // whole.nbytes:
        for row in range(0, whole.count, rows):
            yield _grid(whole.start + row * whole.stride, whole.nbytes, min(rows, whole.count - row), whole.stride)
    else:
        for row in range(whole.count):
            yield from pieces_of(Range(whole.start + row * whole.stride, whole.nbytes), limit)


def within(part: Range, whole: Range) -> Range | None:
    """Where the bytes of ``part`` lie once those of ``whole`` are packed together; ``None`` if not all are in it."""
    if whole.count == 1:
        inside = whole.start <= part.start and part.stop <= whole.stop
        return Range(part.start - whole.start, part.nbytes, part.count, part.stride) if inside else None
    row, column = divmod(part.start - whole.start, whole.stride)
    same = part.count == 1 or part.stride == whole.stride
    if not same or row < 0 or row + part.count > whole.count or column + part.nbytes > whole.nbytes:
        return None
    return _grid(row * whole.nbytes + column, part.nbytes, part.count, whole.nbytes)
