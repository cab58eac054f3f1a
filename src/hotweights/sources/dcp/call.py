"""Call: one call of ``read``: what it asks for, its options, and what came so far."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from ...errors import Closed, UsageError
from ...manifest import TensorSpec
from ...memory.addresses import buffer
from ...memory.pool import Pool
from ...ranges import Range
from ..contracts import IOMode, Read, Sink
from ..files.reading import Segment, read_segments
from .strips import Strip, by_rows, dense, fetch, rows, through_slots

_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


class JointRead(NamedTuple):
    """A read whose bytes do not lie in a row in one file: they are put together, and then given to its sink."""

    name: str
    start: int
    nbytes: int
    sink: Sink


class Orders:
    """What is to be read: segments by the reader of files, and strips with short rows."""

    def __init__(self, limit: int | None) -> None:
        """``limit`` is how many bytes may go through a slot at once; ``None`` if no slot may be taken."""
        self._limit = limit
        self.segments: list[Segment] = []
        self.short: list[tuple[Strip, torch.Tensor]] = []

    def put(self, strips: Iterable[Strip], memory: torch.Tensor) -> None:
        """Add what fills ``memory``, which is ``uint8``."""
        for piece in strips:
            if by_rows(piece):
                self.segments += rows(piece, memory)
            elif self._limit is not None and dense(piece):
                self.segments += through_slots(piece, memory, self._limit)
            else:
                self.short.append((piece, memory))


class ReadCall:
    """The options of one call of ``read``, and what came so far by each I/O path."""

    def __init__(
        self, pool: Pool, threads: int | None, advance: Callable[[int], None] | None, stop: threading.Event
    ) -> None:
        self.pool, self.stop = pool, stop
        self.done = {"buffered": 0, "direct": 0}
        self._threads, self._advance = threads, advance

    def do(self, orders: Orders, io: IOMode) -> None:
        """Read all of it."""
        came = read_segments(
            orders.segments, pool=self.pool, io=io, threads=self._threads, advance=self._advance, stop=self.stop
        )
        for path, nbytes in came.items():
            self.done[path] += nbytes
        for piece, memory in orders.short:
            fetch(piece, memory, self._arrive)

    def _arrive(self, nbytes: int) -> None:
        if self.stop.is_set():
            raise Closed("the reading was stopped")
        self.done["buffered"] += nbytes
        if self._advance is not None:
            self._advance(nbytes)


def in_rows(reads: Iterable[Read]) -> Iterator[tuple[Read, Range, torch.Tensor | None]]:
    """The reads, those of rows that follow each other joined: the first, what is asked for, and the memory it fills.

    The memory is ``None`` for a sink's. It is known by its address: the caller keeps the reads.
    """
    rows: _Rows | None = None
    for read in reads:
        if rows is not None and rows.take(read):
            continue
        if rows is not None:
            yield rows.first, rows.asked(), rows.memory()
        rows = _Rows(read)
    if rows is not None:
        yield rows.first, rows.asked(), rows.memory()


class _Rows:
    """Reads of equal size at equal distances of one tensor, whose bytes go one behind the other."""

    def __init__(self, first: Read) -> None:
        self.first = first
        self._address = first.into.data_ptr() if isinstance(first.into, torch.Tensor) else 0
        self._count, self._stride = 1, 0

    def take(self, read: Read) -> bool:
        """Whether the read is the next row; then it is taken."""
        first, into = self.first, read.into
        if read.name != first.name or read.nbytes != first.nbytes or not isinstance(into, torch.Tensor):
            return False
        stride = read.start - first.start if self._count == 1 else self._stride
        if stride <= first.nbytes or read.start != first.start + self._count * stride:
            return False
        if not self._address or into.data_ptr() != self._address + self._count * first.nbytes:
            return False
        self._count, self._stride = self._count + 1, stride
        return True

    def asked(self) -> Range:
        """What all of them ask for."""
        return Range(self.first.start, self.first.nbytes, self._count, self._stride)

    def memory(self) -> torch.Tensor | None:
        """What they fill, as bytes."""
        if not isinstance(self.first.into, torch.Tensor):
            return None
        nbytes = self._count * self.first.nbytes
        return torch.frombuffer(buffer(self._address, nbytes), dtype=torch.uint8) if nbytes else _NOTHING


def check_read(read: Read, spec: TensorSpec) -> None:
    """Raise ``UsageError`` unless the read lies in the tensor and fits its memory."""
    into = read.into
    # Memory is written by address: a request that does not fit would read a neighbour or overwrite a stranger.
    if read.start < 0 or read.nbytes < 0 or read.start + read.nbytes > spec.nbytes:
        raise UsageError(
            f"tensor {read.name!r} has {spec.nbytes} bytes; {read.nbytes} from {read.start} were asked for"
        )
    if isinstance(into, torch.Tensor) and not (into.nbytes == read.nbytes and into.is_cpu and into.is_contiguous()):
        raise UsageError(
            f"tensor {read.name!r}: {read.nbytes} bytes go into contiguous host memory of as many bytes, not into "
            f"{into.nbytes} of {'contiguous' if into.is_contiguous() else 'strided'} memory on {into.device}"
        )


def fitting(read: Read, pool: Pool) -> Sink:
    """The read's sink. Raises ``UsageError`` if its bytes do not fit into a slot."""
    assert not isinstance(read.into, torch.Tensor)
    if read.nbytes > pool.slot_nbytes:
        raise UsageError(
            f"a sink's read of {read.nbytes} bytes does not fit into a slot; at most {pool.slot_nbytes} do"
        )
    return read.into
