"""Faults that happen when a test says so: a late event, a reused buffer, a source that fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from ..manifest import Manifest
from ..memory.guards import Guard
from ..memory.pool import Pool
from ..sources.contracts import Addressed, IOMode, Read, Stream


class ManualEvent:
    """An event that happens when the test says so."""

    def __init__(self) -> None:
        self._happened = threading.Event()

    def query(self) -> bool:
        """Has it happened?"""
        return self._happened.is_set()

    def happen(self) -> None:
        """Let it happen."""
        self._happened.set()


class ReusedBuffer:
    """Gives every tensor in the same memory, filled with 0xFF as soon as the iterator advances or ends.

    A reader that reuses its buffers does this sooner or later: whoever keeps a tensor finds NaN in it, or the tensor
    that came after it. It can be iterated again and again.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._memory = torch.empty(max((tensor.nbytes for tensor in tensors.values()), default=0), dtype=torch.uint8)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._tensors.items():
            lent = self._memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            lent.copy_(tensor)
            try:
                yield name, lent
            finally:
                self._memory.fill_(0xFF)


class FailingSource:
    """An addressed source that raises ``error`` at its read, or its tensor, number ``at``, counted from 0."""

    def __init__(self, source: Addressed, *, at: int, error: BaseException) -> None:
        self._source = source
        self._at = at
        self._error = error

    @property
    def manifest(self) -> Manifest:
        """That of the source."""
        return self._source.manifest

    def position(self, name: str) -> tuple[int, int]:
        """That of the source."""
        return self._source.position(name)

    def leases(self, *, guard: Guard = "off") -> Stream:
        """Those of the source."""
        return self._source.leases(guard=guard)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Those of the source, up to the fault."""
        for number, pair in enumerate(self._source.tensors()):
            if number == self._at:
                raise self._error
            yield pair

    def read(
        self,
        reads: Iterable[Read],
        *,
        pool: Pool,
        io: IOMode = "auto",
        threads: int | None = None,
        advance: Callable[[int], None] | None = None,
        stop: threading.Event | None = None,
    ) -> dict[str, int]:
        """Do the reads one after another, in the given order, up to the fault."""
        bytes_by_io: dict[str, int] = {}
        for read in reads:
            self._at -= 1
            if self._at < 0:
                raise self._error
            counts = self._source.read([read], pool=pool, io=io, threads=1, advance=advance, stop=stop)
            bytes_by_io |= {path: bytes_by_io.get(path, 0) + count for path, count in counts.items()}
        return bytes_by_io

    def close(self) -> None:
        """Close the source."""
        self._source.close()

    def __enter__(self) -> FailingSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
