"""Arrival: one tensor on its way into a receiver: where its bytes go, and which have yet to come."""

from __future__ import annotations

import torch

from ..errors import ProtocolError, UsageError
from ..manifest import TensorSpec
from ..ranges import Range, disjoint, within
from .copying import over
from .messages import words_of


class _Columns:
    """Parts that come in columns, of each from above: they need not be compared with all that came before."""

    def __init__(self) -> None:
        self._holds, self._stride = True, 0
        self._ends: dict[tuple[int, int], int] = {}  # by the edges of a column, the row behind its last

    def goes_on(self, part: Range) -> bool:
        """Whether all parts so far are so, and no byte is in two."""
        self._stride = self._stride or part.stride
        if not self._holds or not self._stride or part.stride not in (0, self._stride):
            self._holds = False
            return False
        row, column = divmod(part.start, self._stride)
        edges = column, column + part.nbytes
        end = self._ends.get(edges)
        if end is None:
            self._holds = edges[1] <= self._stride and all(b <= edges[0] or edges[1] <= a for a, b in self._ends)
        else:
            self._holds = end <= row
        self._ends[edges] = row + part.count
        return self._holds


class Arrival:
    """A tensor of which some bytes have come.

    Attributes:
        number: of the tensor, in the offer.
        spec: what it is.
        memory: where its bytes go, ``uint8``: the whole tensor; or, if it is ``placed``, the bytes of its one range,
            packed. ``None`` until somebody sets it.
        placed: whether that memory is the consumer's.
    """

    def __init__(self, number: int, spec: TensorSpec, ranges: tuple[Range, ...]) -> None:
        self.number = number
        self.spec = spec
        self.memory: torch.Tensor | None = None
        self.placed = False
        self._ranges = ranges or (Range(0, spec.nbytes),)
        self._left = self.nbytes
        self._seen: list[Range] = []
        self._columns = _Columns()
        self._high = 0  # Nothing has come from this byte on.

    @property
    def nbytes(self) -> int:
        """How many bytes are wanted of it."""
        return sum(wanted.size for wanted in self._ranges)

    @property
    def complete(self) -> bool:
        """Whether every wanted byte has come."""
        return self._left == 0

    def is_all(self, part: Range) -> bool:
        """Whether a part is the whole tensor."""
        return part == Range(0, self.spec.nbytes)

    def take(self, part: Range) -> None:
        """Count a part as come.

        Raises:
            ProtocolError: it is no part of what is wanted, or came before.
        """
        if not part.fits(self.spec.nbytes) or (part.size == 0 and self.spec.nbytes):
            raise ProtocolError(f"{self.spec.name}: {words_of(part)} came; it has {self.spec.nbytes} bytes")
        if all(within(part, wanted) is None for wanted in self._ranges):
            raise ProtocolError(f"{self.spec.name}: {words_of(part)} came, which was not asked for")
        apart = self._columns.goes_on(part) or part.start >= self._high
        if not apart and not all(disjoint((part, seen)) for seen in self._seen):
            raise ProtocolError(f"{self.spec.name}: {words_of(part)} came twice, in whole or in part")
        self._seen.append(part)
        self._high = max(self._high, part.stop)
        self._left -= part.size

    def place(self, room: torch.Tensor) -> None:
        """Have its bytes go into memory of the consumer's.

        Raises:
            UsageError: the memory is not what ``Request.into`` promises.
        """
        if room.dtype != torch.uint8 or room.numel() != self.nbytes or not (room.is_cpu and room.is_contiguous()):
            given = f"{room.dtype} {list(room.shape)} on {room.device}"
            raise UsageError(
                f"{self.spec.name}: Request.into shall give room of {self.nbytes} contiguous uint8 on the host; "
                f"it gave {given}"
            )
        self.memory, self.placed = room, True

    def room(self, part: Range) -> torch.Tensor:
        """Where the bytes of a part go: ``uint8 [n]`` where they lie together, else ``[runs, bytes of a run]``."""
        assert self.memory is not None
        place = within(part, self._ranges[0]) if self.placed else part
        assert place is not None
        return over(self.memory, place)
