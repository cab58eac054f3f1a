"""Memory, Box and Region: which bytes of what. Arithmetic on names and numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import TypeVar

import msgspec
import torch

from .manifest import TensorSpec

T = TypeVar("T")


class Memory(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A piece of memory that operations work on.

    Attributes:
        kind: ``"source"``, ``"model"``, ``"result"`` or ``"constant"``.
        name: the name of the source's or the model's tensor; for results and constants a number.
    """

    kind: str
    name: str


class Box(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Strided elements, as a view has them: a slice, a transpose, a column.

    Attributes:
        dtype: how the bytes are read.
        shape: elements in each dimension.
        stride: distance of neighbours in each dimension, in elements.
        offset: where the first element lies, in bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements, without the holes between them."""
        return self.numel * self.dtype.itemsize


class Region(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A box over a memory. Its offset counts from the memory's first byte."""

    memory: Memory
    box: Box


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor of this shape."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(1, length)
    return tuple(reversed(strides))


def whole(spec: TensorSpec) -> Box:
    """The box that all of a contiguous tensor is."""
    assert isinstance(spec.dtype, torch.dtype)
    return Box(spec.dtype, spec.shape, row_major(spec.shape), 0)


def box_of(tensor: torch.Tensor, base: int = 0) -> Box:
    """The box that ``tensor`` is, counted from ``base`` bytes into its storage."""
    return Box(
        tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()) * tensor.element_size() - base
    )


def contiguous(box: Box) -> bool:
    """Whether its elements lie one behind the other, in row-major order."""
    step = 1
    for length, stride in zip(reversed(box.shape), reversed(box.stride), strict=True):
        if length != 1 and stride != step:
            return box.numel == 0
        step *= length
    return True


def extent(box: Box) -> tuple[int, int]:
    """First byte, and the byte after the last. Both are the offset if the box is empty."""
    if box.numel == 0:
        return box.offset, box.offset
    last = sum((length - 1) * stride for length, stride in zip(box.shape, box.stride, strict=True))
    return box.offset, box.offset + (last + 1) * box.dtype.itemsize


def narrowed(box: Box, start: tuple[int, ...], lengths: tuple[int, ...]) -> Box:
    """The part of ``box`` that begins at index ``start`` and has these lengths."""
    skip = sum(at * stride for at, stride in zip(start, box.stride, strict=True))
    return Box(box.dtype, lengths, box.stride, box.offset + skip * box.dtype.itemsize)


def moved(box: Box, nbytes: int) -> Box:
    """The same box so many bytes further on."""
    return Box(box.dtype, box.shape, box.stride, box.offset + nbytes)


def runs(box: Box) -> tuple[int, Iterator[tuple[tuple[int, ...], int]]]:
    """The box as contiguous runs of equal size, in row-major order.

    Returns:
        How many trailing dimensions a run has, and for each run its index into the leading ones and its first byte.
    """
    inner, step = 0, 1
    for length, stride in zip(reversed(box.shape), reversed(box.stride), strict=True):
        if length != 1 and stride != step:
            break
        step *= length
        inner += 1
    outer = len(box.shape) - inner
    strides = box.stride[:outer]

    def each() -> Iterator[tuple[tuple[int, ...], int]]:
        for index in itertools.product(*(range(length) for length in box.shape[:outer])):
            skip = sum(at * stride for at, stride in zip(index, strides, strict=True))
            yield index, box.offset + skip * box.dtype.itemsize

    return inner, each()


def meets(box: Box, other: Box) -> bool:
    """Whether two boxes over one memory may share a byte. Says yes of some that interleave and share none."""
    (start, stop), (first, last) = extent(box), extent(other)
    return max(start, first) < min(stop, last) and not _apart_by_columns(box, other)


def share_bytes(box: Box, other: Box) -> bool:
    """Whether two boxes over one memory share a byte. Exact: strided boxes are compared byte by byte."""
    (start, stop), (first, last) = extent(box), extent(other)
    if max(start, first) >= min(stop, last) or (contiguous(box) and contiguous(other)):
        return max(start, first) < min(stop, last)
    base = min(start, first)
    touched = torch.zeros(max(stop, last) - base, dtype=torch.bool, device="cpu")
    _bytes(touched, moved(box, -base)).fill_(True)
    return bool(_bytes(touched, moved(other, -base)).any())


def meeting(spans: Iterable[tuple[int, int, T]]) -> Iterator[tuple[T, T]]:
    """Pairs of items whose spans of bytes, from a first one to the one behind the last, overlap.

    The one that begins first stands first; of two that begin together, the larger one.
    """
    reaching: list[tuple[int, int, T]] = []  # Those seen so far that reach past the one at hand.
    for span in sorted(spans, key=lambda span: (span[0], -span[1])):
        reaching = [earlier for earlier in reaching if span[0] < earlier[1]]
        yield from ((earlier[2], span[2]) for earlier in reaching)
        reaching.append(span)


def joined(spans: Iterable[tuple[int, int]], gap: int = 0) -> list[tuple[int, int]]:
    """Spans of bytes, ascending; those that overlap, touch, or lie at most ``gap`` bytes apart are one."""
    result: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if result and start <= result[-1][1] + gap:
            result[-1] = result[-1][0], max(result[-1][1], stop)
        else:
            result.append((start, stop))
    return result


def _apart_by_columns(box: Box, other: Box) -> bool:
    """Whether they are ranges of columns of one matrix, which interleave in memory and share no byte."""
    if box.dtype.itemsize != other.dtype.itemsize or len(box.shape) != len(other.shape) or box.stride != other.stride:
        return False
    if not box.shape or any(stride <= 0 for stride in box.stride):
        return False
    # Coordinates of the first elements, in the common grid that the strides span.
    first, second = _coordinates(box), _coordinates(other)
    if first is None or second is None:
        return False
    return any(
        a + length <= b or b + width <= a
        for a, b, length, width in zip(first, second, box.shape, other.shape, strict=True)
    )


def _coordinates(box: Box) -> tuple[int, ...] | None:
    at, rest = [0] * len(box.shape), box.offset // box.dtype.itemsize
    order = sorted(range(len(box.shape)), key=lambda dim: -box.stride[dim])
    for position, dim in enumerate(order):
        at[dim], rest = divmod(rest, box.stride[dim])
        # The box must not wrap around the next larger stride, or coordinates would be ambiguous.
        if position and (at[dim] + box.shape[dim]) * box.stride[dim] > box.stride[order[position - 1]]:
            return None
    return tuple(at) if rest == 0 else None


def slices(box: Box, of: Box) -> list[tuple[int, int]] | None:
    """``box`` as a range of indices in each dimension of ``of``, which has no holes; ``None`` if it is no such part."""
    if box == of:
        return [(0, length) for length in of.shape]
    if box.dtype != of.dtype or not contiguous(of) or box.numel == 0:
        return None
    counts = _counts_of_run(box.numel, of.shape) if contiguous(box) else _counts_of_grid(box, of)
    rest = (box.offset - of.offset) // of.dtype.itemsize
    indices: list[tuple[int, int]] = []
    for length, stride, count in zip(of.shape, row_major(of.shape), counts or (), strict=False):
        start, rest = divmod(rest, stride)
        if start + count > length:
            return None
        indices.append((start, start + count))
    return indices if counts is not None and rest == 0 else None


def _counts_of_run(numel: int, shape: tuple[int, ...]) -> list[int] | None:
    """How far a run of elements that lie one behind the other reaches in each dimension."""
    counts: list[int] = []
    for length in reversed(shape):
        count = min(numel, length)
        if numel % count:
            return None
        counts.append(count)
        numel //= count
    return counts[::-1] if numel == 1 else None


def _counts_of_grid(box: Box, of: Box) -> list[int] | None:
    """How far a box of the same strides reaches; dimensions of one element may be dropped or added."""
    lengths = [pair for pair in zip(box.shape, box.stride, strict=True) if pair[0] != 1]
    counts = [
        lengths.pop(0)[0] if lengths and lengths[0][1] == stride and length > 1 else 1
        for length, stride in zip(of.shape, row_major(of.shape), strict=True)
    ]
    return None if lengths else counts


def covered(boxes: Iterable[Box], target: Box) -> int:
    """How many elements of ``target`` the boxes cover, each counted once. Boxes may reach beyond it on both sides."""
    parts = [box for box in boxes if box.numel]
    if any(box == target for box in parts):
        return target.numel
    spans = [extent(box) for box in parts if contiguous(box)]
    if contiguous(target) and len(spans) == len(parts):
        low, high = extent(target)
        inside = [(max(start, low), min(stop, high)) for start, stop in spans if start < high and stop > low]
        return sum(stop - start for start, stop in joined(inside)) // target.dtype.itemsize
    if not target.numel:
        return 0
    spans = [extent(box) for box in (*parts, target)]
    first = min(start for start, _ in spans)
    grid = torch.zeros(max(stop for _, stop in spans) - first, dtype=torch.bool, device="cpu")
    for box in parts:
        _bytes(grid, moved(box, -first)).fill_(True)
    return int(_bytes(grid, moved(target, -first)).all(dim=-1).sum())


def _bytes(grid: torch.Tensor, box: Box) -> torch.Tensor:
    """The box over ``grid``, which has an element for each byte of the memory, with a dimension for bytes behind."""
    size = box.dtype.itemsize
    return grid.as_strided((*box.shape, size), (*(stride * size for stride in box.stride), 1), box.offset)


def pieces(shape: tuple[int, ...], limit: int) -> Iterator[tuple[tuple[int | slice, ...], int, tuple[int, ...]]]:
    """Cut a row-major tensor into contiguous boxes of at most ``limit`` elements.

    Yields for each its index into the tensor, its first element, and its shape.
    """
    yield from _pieces(shape, max(1, limit), (), 0)


def _pieces(
    shape: tuple[int, ...], limit: int, prefix: tuple[int | slice, ...], first: int
) -> Iterator[tuple[tuple[int | slice, ...], int, tuple[int, ...]]]:
    row = 1
    for length in shape[1:]:
        row *= length
    if not shape or shape[0] * row <= limit:
        yield prefix, first, shape
    elif row <= limit:
        rows = limit // row
        for start in range(0, shape[0], rows):
            stop = min(start + rows, shape[0])
            yield (*prefix, slice(start, stop)), first + start * row, (stop - start, *shape[1:])
    else:
        for index in range(shape[0]):
            yield from _pieces(shape[1:], limit, (*prefix, index), first + index * row)


def view(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """The box over ``tensor``'s memory, which it shares. The offset counts from the tensor's first element."""
    return _at(tensor.untyped_storage(), int(tensor.storage_offset()) * tensor.element_size(), tensor.device, box)


def _at(storage: torch.UntypedStorage, base: int, device: torch.device, box: Box) -> torch.Tensor:
    first, rest = divmod(base + box.offset, box.dtype.itemsize)
    assert rest == 0, f"a {box.dtype} at byte {base + box.offset}"
    return torch.empty(0, dtype=box.dtype, device=device).set_(storage, first, box.shape, box.stride)
