"""Part and Passing: some tensors of a source as a source of their own. They read; they never decide which."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from types import TracebackType

import torch
from msgspec.structs import replace

from ..errors import UnsupportedDtype
from ..guards import Guard
from ..manifest import Manifest, OpaqueDtype, TensorSpec
from ..memory import Lease, Pool, host_empty
from .contracts import Addressed, Read, Reading
from .streams import LeaseStream, ahead

__all__ = ["Part", "Passing", "owned_tensors", "unsupported"]

_BATCH = 32 * 1024 * 1024  # bytes of owned tensors that are read ahead


def unsupported(spec: TensorSpec) -> str | None:
    """Why the tensor cannot be owned, if torch has no type for it; ``leases()`` carries its bytes."""
    if not isinstance(spec.dtype, OpaqueDtype):
        return None
    return f"tensor {spec.name!r} has dtype {spec.dtype}, for which torch {torch.__version__} has no type"


def owned_tensors(
    source: Addressed, specs: Iterable[TensorSpec], *, reading: Reading = "auto"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield these tensors of ``source``, in this order, each in memory of its own, read one batch ahead.

    Raises:
        UnsupportedDtype: before the first tensor, if torch has no type for one.
    """
    specs = list(specs)
    for spec in specs:
        if (problem := unsupported(spec)) is not None:
            raise UnsupportedDtype(problem)
    return _own_all(source, specs, reading)


def _own_all(
    source: Addressed, specs: list[TensorSpec], reading: Reading
) -> Generator[tuple[str, torch.Tensor], None, None]:
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        pool.wake()

    with Pool() as pool:
        work = (partial(_read_batch, source, batch, pool, reading, stopped) for batch in _batches(specs))
        batches = ahead(work, depth=1, stop=stop)
        try:
            for batch in batches:
                yield from batch
        finally:
            batches.close()


def _batches(specs: list[TensorSpec]) -> Iterator[list[TensorSpec]]:
    """Batches of at most ``_BATCH`` bytes; a larger tensor is one of its own."""
    batch: list[TensorSpec] = []
    nbytes = 0
    for spec in specs:
        if batch and nbytes + spec.nbytes > _BATCH:
            yield batch
            batch, nbytes = [], 0
        batch.append(spec)
        nbytes += spec.nbytes
    if batch:
        yield batch


def _read_batch(
    source: Addressed, specs: list[TensorSpec], pool: Pool, reading: Reading, stopped: threading.Event
) -> list[tuple[str, torch.Tensor]]:
    batch: list[tuple[str, torch.Tensor]] = []
    for spec in specs:
        assert not isinstance(spec.dtype, OpaqueDtype)
        batch.append((spec.name, host_empty(spec.shape, spec.dtype)))
    source.read(
        (Read(name, 0, tensor.nbytes, tensor) for name, tensor in batch), pool=pool, reading=reading, stop=stopped
    )
    return batch


class Passing:
    """Owned tensors that pass once, with a manifest that was known before."""

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
        """Nothing: whoever gave the tensors closes what they come from."""

    def __enter__(self) -> Passing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Part(Passing):
    """Tensors of an addressed source under other names. The source stays its owner's, and open."""

    def __init__(self, source: Addressed, names: Mapping[str, str]) -> None:
        """``names``: of each tensor its name here, and the source's."""
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
        """Where the source has it."""
        return self._source.position(self._names[name])

    def read(
        self,
        reads: Iterable[Read],
        *,
        pool: Pool,
        reading: Reading = "auto",
        threads: int | None = None,
        advance: Callable[[int], None] | None = None,
        stop: threading.Event | None = None,
    ) -> dict[str, int]:
        """Let the source do all the reads, see ``contracts.Addressed``."""
        theirs = (read._replace(name=self._names[read.name]) for read in reads)
        return self._source.read(theirs, pool=pool, reading=reading, threads=threads, advance=advance, stop=stop)
