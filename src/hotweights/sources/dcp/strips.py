"""Strips: what is read of files for a box of a tensor, and where it goes. Long rows go straight into place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from ...boxes import Box, extent, moved, narrowed, view
from ...memory.addresses import buffer
from ...memory.host import host_empty
from ..files.file import File
from ..files.reading import Segment

_RUN = 512  # bytes of a row from which it is read by itself; below that the bytes between are read too
_LONG = 32 * 1024  # bytes of a row that take as long to copy as a read of their own takes to begin
_SCRATCH = 1024 * 1024  # bytes that are read at once where rows are short


class Strip(NamedTuple):
    """A box that lies in a file with some strides, and goes into memory with others; both are boxes of bytes.

    Attributes:
        file: where it lies.
        lying: how it lies there, counted from the file's first byte.
        going: how it lies in the memory, counted from that memory's first byte.
    """

    file: File
    lying: Box
    going: Box


def strip(
    file: File, shape: tuple[int, ...], lying: tuple[int, Sequence[int]], going: tuple[int, Sequence[int]]
) -> Strip:
    """The strip of this shape; ``lying`` and ``going`` are a first byte and strides. Bytes in a row become one."""
    dims = [(length, a, b) for length, a, b in zip(shape, lying[1], going[1], strict=True) if length != 1]
    joined: list[tuple[int, int, int]] = []
    for length, a, b in reversed(dims):
        if joined and (a, b) == (joined[-1][0] * joined[-1][1], joined[-1][0] * joined[-1][2]):
            inner = joined.pop()
            length, a, b = length * inner[0], *inner[1:]
        joined.append((length, a, b))
    lengths, there, here = zip(*reversed(joined), strict=True) if joined else ((1,), (1,), (1,))
    return Strip(file, Box(torch.uint8, lengths, there, lying[0]), Box(torch.uint8, lengths, here, going[0]))


def single(piece: Strip) -> bool:
    """Whether its bytes lie in a row, in the file and in the memory."""
    return len(piece.lying.shape) == 1 and piece.lying.stride == piece.going.stride == (1,)


def by_rows(piece: Strip) -> bool:
    """Whether its rows are long enough to be read straight into place."""
    row = piece.lying.shape[-1] if piece.lying.stride[-1] == piece.going.stride[-1] == 1 else 1
    return single(piece) or row >= (_LONG if dense(piece) else _RUN)


def dense(piece: Strip) -> bool:
    """Whether no other bytes lie between its own."""
    return _nbytes(piece.lying) == piece.lying.nbytes


def through_slots(piece: Strip, memory: torch.Tensor, limit: int) -> Iterator[Segment]:
    """Reads of at most ``limit`` bytes that the pool's slots hold, and that are copied from there into ``memory``."""
    for part in _parts(piece, limit):
        start, stop = extent(part.lying)
        yield Segment(piece.file, start, stop - start, partial(_copy, part, memory))


def _copy(piece: Strip, memory: torch.Tensor, raw: torch.Tensor) -> None:
    view(memory, piece.going).copy_(view(raw, moved(piece.lying, -piece.lying.offset)))


def rows(piece: Strip, memory: torch.Tensor) -> Iterator[Segment]:
    """A read for each row, straight into ``memory``, which is ``uint8``."""
    *outer, row = piece.lying.shape
    for index in itertools.product(*map(range, outer)):
        there, here = (
            box.offset + sum(at * stride for at, stride in zip(index, box.stride, strict=False))
            for box in (piece.lying, piece.going)
        )
        yield Segment(piece.file, there, row, memory[here : here + row])


def fetch(piece: Strip, memory: torch.Tensor, arrive: Callable[[int], None]) -> None:
    """Read what has short rows with the bytes between them, and copy it into ``memory``."""
    scratch = host_empty((min(_SCRATCH, _nbytes(piece.lying)),), torch.uint8)
    for part in _parts(piece, _SCRATCH):
        start, stop = extent(part.lying)
        part.file.read_into([buffer(scratch.data_ptr(), stop - start)], start)
        _copy(part, memory, scratch)
        arrive(part.lying.nbytes)
    piece.file.check()


def _nbytes(box: Box) -> int:
    start, stop = extent(box)
    return stop - start


def _parts(piece: Strip, limit: int) -> Iterator[Strip]:
    """The strip, cut so that no part spans more than ``limit`` bytes of the file."""
    if _nbytes(piece.lying) <= limit:
        yield piece
        return
    dims = range(len(piece.lying.shape))
    longest = max(dims, key=lambda dim: (piece.lying.shape[dim] - 1) * piece.lying.stride[dim])
    half = piece.lying.shape[longest] // 2
    for start, length in ((0, half), (half, piece.lying.shape[longest] - half)):
        begin = tuple(start if dim == longest else 0 for dim in dims)
        shape = tuple(length if dim == longest else piece.lying.shape[dim] for dim in dims)
        half_of_it = Strip(piece.file, narrowed(piece.lying, begin, shape), narrowed(piece.going, begin, shape))
        yield from _parts(half_of_it, limit)
