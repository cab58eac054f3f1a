"""Packing: tensors are cut into the pieces that receivers want, and pieces are put into slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..ranges import Range, pieces_of, shared
from .copying import flat, over, parts, put
from .messages import Chunk
from .shared_memory import WriteSlots, aligned


class Piece(NamedTuple):
    """Bytes of a tensor that fit into a slot; ``asking`` are the places, in a list of receivers, of who wants them."""

    range: Range
    content: torch.Tensor
    asking: frozenset[int]


def pieces(tensor: torch.Tensor, requests: Sequence[tuple[int, tuple[Range, ...]]], limit: int) -> Iterator[Piece]:
    """What is wanted of a tensor, each byte once however many want it. No copies are made of a contiguous tensor.

    Args:
        tensor: read only while this is iterated.
        requests: the place of a receiver and the ranges that it wants, for each; no ranges for all of the tensor.
        limit: bytes that a piece may have at most.
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
        bytes_of = bytes_of.contiguous().view(-1).view(torch.uint8)  # Ranges are of its row-major order.
    for wanted, places in shared(ranges):
        asking = frozenset(requests[place][0] for place in places)
        yield from (Piece(part, over(bytes_of, part), asking) for part in pieces_of(wanted, limit))


class Packing:
    """The slot that is being filled.

    Attributes:
        slot: its number; ``None`` when there is none.
        packed: what it holds, and who wants it.
    """

    def __init__(self, slots: WriteSlots, *, hashed: bool) -> None:
        self.slot: int | None = None
        self.packed: list[tuple[Chunk, frozenset[int]]] = []
        self._slots = slots
        self._hashed = hashed
        self._offset = 0

    def begin(self, slot: int) -> None:
        """Fill this slot from now on; nobody reads it, but who was given up."""
        self._slots.roll.note_fill(slot, 0)
        self.slot = slot

    def has_room(self, nbytes: int) -> bool:
        """Whether there is a slot, and so many bytes fit behind what it holds."""
        return self.slot is not None and self._offset + nbytes <= self._slots.slot_nbytes

    def put(self, tensor: int, piece: Piece) -> None:
        """Copy a piece into the slot, which has room for it."""
        assert self.slot is not None
        stop = self._offset + piece.range.size
        memory = self._slots.memories[self.slot][self._offset : stop]
        digest = put(piece.content, memory, hashed=self._hashed)
        self.packed.append((Chunk(tensor, piece.range, self._offset, digest), piece.asking))
        self._offset = aligned(stop)

    def take(self) -> tuple[int | None, list[tuple[Chunk, frozenset[int]]], int]:
        """The slot, what it holds, and the fill that it bears from now on. After this there is no slot."""
        fill = 0
        if self.slot is not None:
            fill = self._slots.next_fill()
            self._slots.roll.note_fill(self.slot, fill)
        filled = self.slot, self.packed, fill
        self.slot, self.packed, self._offset = None, [], 0
        return filled
