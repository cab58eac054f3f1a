"""Arrival: one tensor on its way into a receiver: where its bytes go, and which have yet to come. It never waits."""

from __future__ import annotations

import torch

from ..errors import ProtocolError, UsageError
from ..manifest import TensorSpec
from ..memory.host import host_empty
from ..ranges import Range, disjoint, within
from .copying import over


class Arrival:
    """A tensor of which some bytes have come.

    Attributes:
        number: of the tensor, in the offer.
        spec: what it is.
        memory: where its bytes go, ``uint8``: as they lie in the tensor; or, if it is ``placed``, those of its one
            range one behind the other. ``None`` until somebody sets it.
        placed: whether that memory is the consumer's.
    """

    def __init__(self, number: int, spec: TensorSpec, ranges: tuple[Range, ...]) -> None:
        self.number = number
        self.spec = spec
        self.memory: torch.Tensor | None = None
        self.placed = False
        self._ranges = ranges or (Range(0, spec.nbytes),)
        self._left = sum(one.size for one in self._ranges)
        self._seen: list[Range] = []
        self._high = 0  # Behind this byte nothing has come.

    @property
    def nbytes(self) -> int:
        """How many bytes are wanted of it."""
        return sum(one.size for one in self._ranges)

    @property
    def complete(self) -> bool:
        """Whether every wanted byte has come."""
        return self._left == 0

    def is_all(self, part: Range) -> bool:
        """Whether a part is the whole tensor, byte for byte."""
        return part == Range(0, self.spec.nbytes)

    def take(self, part: Range) -> None:
        """Count a part as come.

        Raises:
            ProtocolError: it is no part of what is wanted, or came before.
        """
        if not part.fits(self.spec.nbytes) or (part.size == 0 and self.spec.nbytes):
            raise ProtocolError(f"{self.spec.name}: it has {self.spec.nbytes} bytes, not {part}")
        if all(within(part, one) is None for one in self._ranges):
            raise ProtocolError(f"{self.spec.name}: {part} was not asked for")
        if part.start < self._high and not all(disjoint((part, one)) for one in self._seen):
            raise ProtocolError(f"{self.spec.name}: {part} came twice")
        self._seen.append(part)
        self._high = max(self._high, part.stop)
        self._left -= part.size

    def place(self, room: torch.Tensor) -> None:
        """Have its bytes go into room of the consumer's.

        Raises:
            UsageError: that is not what a request promises.
        """
        if room.dtype != torch.uint8 or room.numel() != self.nbytes or not (room.is_cpu and room.is_contiguous()):
            found = f"{room.dtype} {list(room.shape)} on {room.device}"
            raise UsageError(f"{self.spec.name}: {self.nbytes} contiguous bytes of room were wished for, not {found}")
        self.memory, self.placed = room, True

    def room(self, part: Range) -> torch.Tensor:
        """Where the bytes of a part go; of one dimension where they lie together, else runs by bytes."""
        assert self.memory is not None
        place = within(part, self._ranges[0]) if self.placed else part
        assert place is not None
        return over(self.memory, place)


class Private:
    """Memory of a receiver's own for one tensor at a time, used again and again. Grows to the largest."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> torch.Tensor:
        """``uint8 [nbytes]``, until the next call."""
        if self._memory.numel() < nbytes:
            self._memory = host_empty((nbytes,), torch.uint8)
        return self._memory[:nbytes]
