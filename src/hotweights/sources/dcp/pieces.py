"""Pieces: which bytes of which parts are some bytes of a tensor, and whether the parts are all of it. Arithmetic."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ...boxes import row_major
from ...ranges import Range
from .saved import SavedPart, SavedTensor

_Box = tuple[tuple[int, ...], tuple[int, ...]]  # the first index and the lengths, in each dimension


class Piece(NamedTuple):
    """A box within one part of a tensor, and where it goes.

    Attributes:
        number: of the part.
        begin: the box's first index in the tensor, bytes last.
        lengths: of the box.
        into: where its first byte goes, counted from that of the memory.
        strides: bytes between neighbours there.
    """

    number: int
    begin: tuple[int, ...]
    lengths: tuple[int, ...]
    into: int
    strides: tuple[int, ...]


class Mosaic:
    """A tensor that lies in parts. Its last dimension, here, is the bytes of an element.

    Attributes:
        parts: those that are not empty, by their first byte.
        strides: bytes between neighbours of each dimension of the whole tensor, row-major.
    """

    def __init__(self, tensor: SavedTensor) -> None:
        item = tensor.dtype.itemsize
        self.shape = (*tensor.shape, item)
        self.strides = row_major(self.shape)
        filled = [part for part in dict.fromkeys(tensor.parts) if 0 not in part.shape]
        self.parts = sorted(filled, key=lambda part: (self.first(part.offsets), part.shape))
        self._boxes = [((*part.offsets, 0), (*part.shape, item)) for part in self.parts]
        self._starts = [self.first(part.offsets) for part in self.parts]
        stops = (
            start + self.first(tuple(length - 1 for length in part.shape)) + item
            for start, part in zip(self._starts, self.parts, strict=True)
        )
        self._reach = list(itertools.accumulate(stops, max))  # Ascending, so that it can be searched.

    def first(self, index: tuple[int, ...]) -> int:
        """The first byte of the element at this index."""
        return sum(at * stride for at, stride in zip(index, self.strides, strict=False))

    def cut(self, asked: Range) -> Iterator[Piece]:
        """The bytes asked for as boxes, each within one part."""
        numbers = range(bisect_right(self._reach, asked.start), bisect_left(self._starts, asked.stop))
        for box, into, strides in self._laid(asked):
            for number in numbers:
                if (common := _common(box, self._boxes[number])) is not None:
                    skip = sum(
                        (at - zero) * stride for at, zero, stride in zip(common[0], box[0], strides, strict=True)
                    )
                    yield Piece(number, *common, into + skip, strides)

    def _laid(self, asked: Range) -> Iterator[tuple[_Box, int, tuple[int, ...]]]:
        """The bytes asked for as boxes; where each begins in what is asked for, and its strides there."""
        if asked.count == 1:
            for box in _boxes(self.shape, asked.start, asked.stop):
                yield box, self.first(box[0]) - asked.start, self.strides
            return
        (row, column), nbytes = divmod(asked.start, asked.stride), asked.nbytes
        if asked.stride not in self.strides or column + nbytes > asked.stride:
            for at in range(asked.count):
                for box, into, strides in self._laid(Range(asked.start + at * asked.stride, nbytes)):
                    yield box, into + at * nbytes, strides
            return
        dims = self.strides.index(asked.stride) + 1
        outer, inner = row_major(self.shape[:dims]), self.strides[dims:]
        strides = (*(stride * nbytes for stride in outer), *inner)
        for begin, lengths in _boxes(self.shape[:dims], row, row + asked.count):
            skip = (_dot(begin, outer) - row) * nbytes
            for first, widths in _boxes(self.shape[dims:], column, column + nbytes):
                yield ((*begin, *first), (*lengths, *widths)), skip + _dot(first, inner) - column, strides


def _dot(index: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum(at * stride for at, stride in zip(index, strides, strict=True))


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[_Box]:
    """A run of elements as boxes: all of its whole rows together, and what is before and behind them."""
    if start == stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        yield from _in_row(shape, first, head, tail)
        return
    if head:
        yield from _in_row(shape, first, head, row)
        first += 1
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(shape, last, 0, tail)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[_Box]:
    for begin, lengths in _boxes(shape[1:], start, stop):
        yield (row, *begin), (1, *lengths)


def _common(box: _Box, other: _Box) -> _Box | None:
    begin = tuple(map(max, box[0], other[0]))
    ends = (min(a + n, b + m) for a, n, b, m in zip(*box, *other, strict=True))
    lengths = tuple(end - at for end, at in zip(ends, begin, strict=True))
    return (begin, lengths) if all(length > 0 for length in lengths) else None


def faults(name: str, tensor: SavedTensor) -> list[str]:
    """Why the parts are not the tensor: one lies outside, two overlap, or some are missing."""
    shape = tensor.shape
    parts = [part for part in dict.fromkeys(tensor.parts) if 0 not in part.shape]
    outside = [part for part in parts if not _inside(part, shape)]
    if outside:
        return [f"tensor {name!r} has shape {list(shape)}; {_said(part)} does not lie in it" for part in outside]
    if pair := _overlap(parts, len(shape)):
        return [f"tensor {name!r}: {_said(pair[0])} and {_said(pair[1])} overlap"]
    held, all_of_it = sum(math.prod(part.shape) for part in parts), math.prod(shape)
    if held < all_of_it:
        return [f"tensor {name!r}: its parts hold {held} of its {all_of_it} elements; was it saved by all ranks?"]
    return []


def _inside(part: SavedPart, shape: tuple[int, ...]) -> bool:
    return len(part.offsets) == len(part.shape) == len(shape) and all(
        at + length <= most for at, length, most in zip(part.offsets, part.shape, shape, strict=True)
    )


def _overlap(parts: Sequence[SavedPart], dims: int) -> tuple[SavedPart, SavedPart] | None:
    """Two parts that share an element. They are swept along the dimension in which most begin apart."""
    along = max(range(dims), default=0, key=lambda dim: len({part.offsets[dim] for part in parts}))
    ordered = sorted(parts, key=lambda part: part.offsets[along : along + 1])
    reaching: list[tuple[int, int]] = []  # Where each part ends that was met and reaches on; and its number.
    for number, part in enumerate(ordered):
        start, length = (part.offsets[along], part.shape[along]) if dims else (0, 1)
        del reaching[: bisect_right(reaching, (start, len(ordered)))]
        for _, other in reaching:
            if _common((part.offsets, part.shape), (ordered[other].offsets, ordered[other].shape)) is not None:
                return ordered[other], part
        insort(reaching, (start + length, number))
    return None


def _said(part: SavedPart) -> str:
    return f"its part {list(part.shape)} at {list(part.offsets)}"
