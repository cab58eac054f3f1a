"""Subset, Passing and Readings: some tensors of a source, as a source of their own or as pairs."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping

import torch
from msgspec.structs import replace

from ..manifest import Manifest, TensorSpec
from ..memory.guards import Guard
from ..memory.lease import Lease
from ..memory.pool import Pool
from ..sources.contracts import Addressed, IOMode, Read
from ..sources.owned import owned_tensors
from ..sources.streams import LeaseStream


class Readings:
    """The owned tensors of several parts of a source, one part after another.

    The first tensors of a part are read ahead while the last ones of the part before are still being used.
    """

    def __init__(self, source: Addressed, parts: Iterable[Mapping[str, str]]) -> None:
        """``parts``: the names of each, as for ``Subset``, in the order in which they will be asked for."""
        self._source = source
        self._left = deque(parts)
        self._running: Generator[tuple[str, torch.Tensor], None, None] | None = None
        self._whole = True  # Whether the part before was read to its end. If not, its rest comes before the next part.

    def pairs(self, part: Mapping[str, str]) -> Generator[tuple[str, torch.Tensor], None, None]:
        """The tensors of the next part. What is left of the part before is not read any more."""
        if not self._whole:
            self.close()
        if self._running is None:
            self._running = owned_tensors(self._source, *map(self._in_order, self._left))
        assert self._left[0] is part, "the parts are asked for in their order"
        self._left.popleft()
        self._whole = False
        return self._read({theirs: ours for ours, theirs in part.items()}, self._running)

    def _in_order(self, part: Mapping[str, str]) -> list[TensorSpec]:
        return [self._source.manifest[name] for name in sorted(part.values(), key=self._source.position)]

    def _read(
        self, ours: Mapping[str, str], running: Iterator[tuple[str, torch.Tensor]]
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        for name, tensor in itertools.islice(running, len(ours)):
            yield ours[name], tensor
        self._whole = True

    def close(self) -> None:
        """End the reading ahead. May be called twice."""
        running, self._running = self._running, None
        if running is not None:
            running.close()


class Passing:
    """A source of owned tensors that come once, with a manifest that was known before."""

    def __init__(self, manifest: Manifest, pairs: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._manifest = manifest
        self._pairs = pairs

    @property
    def manifest(self) -> Manifest:
        """Name, dtype and shape of every tensor."""
        return self._manifest

    def leases(self, *, guard: Guard = "off") -> LeaseStream:
        """Stream every tensor. None is borrowed, so no guard has anything to watch."""
        return LeaseStream(
            Lease(self._manifest[name], tensor=tensor, borrowed=False, guard=guard) for name, tensor in self._pairs
        )

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor."""
        return iter(self._pairs)

    def close(self) -> None:
        """Do nothing: whoever gave the tensors closes what they come from."""

    def __enter__(self) -> Passing:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Subset(Passing):
    """Some tensors of an addressed source, under other names. The source stays open."""

    def __init__(self, source: Addressed, names: Mapping[str, str]) -> None:
        """``names``: from each tensor's name here to its name in the source."""
        self._source = source
        self._names = names
        renamed = Manifest(replace(source.manifest[theirs], name=ours) for ours, theirs in names.items())
        super().__init__(renamed, ())

    def leases(self, *, guard: Guard = "off") -> LeaseStream:
        """Stream every tensor in memory of its own."""
        return Passing(self._manifest, self.tensors()).leases(guard=guard)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor in memory of its own, in the order in which the source is read fastest."""
        return owned_tensors(self, sorted(self._manifest.values(), key=lambda spec: self.position(spec.name)))

    def position(self, name: str) -> tuple[int, int]:
        """Where it lies in the source."""
        return self._source.position(self._names[name])

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
        """Let the source do all the reads, see ``contracts.Addressed``."""
        theirs = (Read(self._names[read.name], read.start, read.nbytes, read.into) for read in reads)
        return self._source.read(theirs, pool=pool, io=io, threads=threads, advance=advance, stop=stop)
