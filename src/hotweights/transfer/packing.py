"""Packing: what is wanted of tensors, into slots, one after the other. It neither waits nor sends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..ranges import Range, pieces_of, shared
from .copying import flat, over, parts, put
from .messages import Part
from .slots import WriteSlots, aligned


class Piece(NamedTuple):
    """Bytes of a tensor that fit into a slot, and who wants them: places in a list of receivers."""

    range: Range
    content: torch.Tensor
    asking: frozenset[int]


def pieces(tensor: torch.Tensor, requests: Sequence[tuple[int, tuple[Range, ...]]], limit: int) -> Iterator[Piece]:
    """What is wanted of a tensor, each byte once however many want it; views of it where it lies in row-major order.

    Args:
        tensor: what is sent; read only while this is iterated.
        requests: by place of a receiver, the ranges that it wants; none for all of the tensor.
        limit: bytes that a piece may have.
    """
    bytes_of = flat(tensor)
    everything = (Range(0, bytes_of.nbytes),)
    ranges = [ranges or everything for _, ranges in requests]
    plain = bytes_of.dtype is torch.uint8 and bytes_of.ndim == 1
    if not plain and set(ranges) == {everything}:
        asking = frozenset(place for place, _ in requests)
        yield from (Piece(Range(start, part.nbytes), part, asking) for start, part in parts(bytes_of, limit))
        return
    if not plain or not bytes_of.is_contiguous():
        bytes_of = bytes_of.contiguous().view(-1).view(torch.uint8)  # Slices of its row-major order lie nowhere else.
    for one, places in shared(ranges):
        asking = frozenset(requests[place][0] for place in places)
        yield from (Piece(piece, over(bytes_of, piece), asking) for piece in pieces_of(one, limit))


class Packing:
    """The slot that is being filled.

    Attributes:
        slot: its number; whoever sets it knows that nobody reads it.
        packed: what it holds, and who wants it.
    """

    def __init__(self, slots: WriteSlots, *, hashed: bool) -> None:
        self.slot: int | None = None
        self.packed: list[tuple[Part, frozenset[int]]] = []
        self._slots = slots
        self._hashed = hashed
        self._offset = 0

    def has_room(self, nbytes: int) -> bool:
        """Whether so many bytes fit behind what the slot holds."""
        return self.slot is not None and self._offset + nbytes <= self._slots.slot_nbytes

    def put(self, tensor: int, piece: Piece) -> None:
        """Copy a piece into the slot. The digest is that of the tensor's own bytes."""
        assert self.slot is not None
        stop = self._offset + piece.range.size
        memory = self._slots.memories[self.slot][self._offset : stop]
        digest = put(piece.content, memory, hashed=self._hashed)
        self.packed.append((Part(tensor, piece.range, self._offset, digest), piece.asking))
        self._offset = aligned(stop)

    def take(self) -> tuple[int | None, list[tuple[Part, frozenset[int]]]]:
        """The slot and what it holds, to be handed over; the next begins with none."""
        found = self.slot, self.packed
        self.slot, self.packed, self._offset = None, [], 0
        return found
