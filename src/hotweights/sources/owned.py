"""Owned tensors: read from an addressed source, each into memory of its own."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Generator, Iterable, Iterator
from functools import partial

import torch

from ..dtypes import OpaqueDtype
from ..errors import UnsupportedDtype
from ..manifest import TensorSpec
from ..memory.host import host_empty
from ..memory.pool import Pool
from .contracts import Addressed, IOMode, Read
from .streams import ahead

# Bytes that are read ahead. With this little, a batch gets the memory of tensors that were just freed, still in the
# cache. Four times as much took twice as long: every batch got memory that nobody had touched.
_BATCH = 8 * 1024 * 1024


def unsupported(spec: TensorSpec) -> str | None:
    """Why the tensor cannot be owned, if torch has no type for it."""
    if not isinstance(spec.dtype, OpaqueDtype):
        return None
    return (
        f"tensor {spec.name!r} has dtype {spec.dtype}, for which torch {torch.__version__} has no type; "
        "leases() of the source carry its bytes"
    )


def owned_tensors(
    source: Addressed, *groups: Iterable[TensorSpec], io: IOMode = "auto"
) -> Generator[tuple[str, torch.Tensor], None, None]:
    """Yield these tensors of ``source``, in this order, each in memory of its own, read one batch ahead.

    No batch holds tensors of two groups, so that a failure to read comes in the group that it belongs to.

    Raises:
        UnsupportedDtype: before the first tensor, if torch has no type for one.
    """
    specs = [list(group) for group in groups]
    for spec in itertools.chain(*specs):
        if (problem := unsupported(spec)) is not None:
            raise UnsupportedDtype(problem)
    return _own_all(source, [batch for group in specs for batch in _batches(group)], io)


def _own_all(
    source: Addressed, wanted: list[list[TensorSpec]], io: IOMode
) -> Generator[tuple[str, torch.Tensor], None, None]:
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        pool.wake()

    with Pool() as pool:
        work = (partial(_read_batch, source, batch, pool, io, stopped) for batch in wanted)
        batches = ahead(work, depth=1, stop=stop)
        try:
            for batch in batches:
                yield from batch
        finally:
            batches.close()


def _batches(specs: list[TensorSpec]) -> Iterator[list[TensorSpec]]:
    """Batches of at most ``_BATCH`` bytes; a larger tensor is a batch of its own."""
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
    source: Addressed, specs: list[TensorSpec], pool: Pool, io: IOMode, stopped: threading.Event
) -> list[tuple[str, torch.Tensor]]:
    batch: list[tuple[str, torch.Tensor]] = []
    for spec in specs:
        assert not isinstance(spec.dtype, OpaqueDtype)
        batch.append((spec.name, host_empty(spec.shape, spec.dtype)))
    source.read((Read(name, 0, tensor.nbytes, tensor) for name, tensor in batch), pool=pool, io=io, stop=stopped)
    return batch
