"""``reads_of``: the reads that fetch one copy from a source that can be asked for any bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from ..boxes import Box, contiguous, extent, narrowed, pieces, runs, view
from ..dtypes import OpaqueDtype
from ..manifest import TensorSpec
from ..memory.devices import Event, as_here, record_event
from ..memory.host import advise_huge_pages
from ..plan.steps import Copy
from ..signals import held
from ..sources.contracts import Read, Sink

_LARGE = 4 * 1024 * 1024  # bytes from which a destination is worth a huge page
_RUN = 512  # bytes of a contiguous run from which it is read by itself; below that the bytes between are read too


def reads_of(step: Copy, spec: TensorSpec, destination: torch.Tensor, limit: int) -> Iterable[Read]:
    """The reads of one copy: straight into the destination where the bytes stay as they are, else through sinks.

    Args:
        step: the copy.
        spec: of its source.
        destination: the model's tensor.
        limit: the most bytes that one read through a sink may have, since it must fit into a slot of the pool.
    """
    target = destination if step.into is None else view(destination, step.into)
    small = 0 < spec.nbytes < _LARGE
    if small and step.of is None and target.dtype == spec.dtype and target.is_cpu and target.is_contiguous():
        return (Read(spec.name, 0, spec.nbytes, target),)  # The only ones that come in their thousands.
    return _reads_of(step, spec, target, limit)


def _reads_of(step: Copy, spec: TensorSpec, target: torch.Tensor, limit: int) -> Iterator[Read]:
    if spec.nbytes == 0 or target.numel() == 0:
        return
    assert not isinstance(spec.dtype, OpaqueDtype)
    if step.of is None or contiguous(step.of):
        dtype, first = (spec.dtype, 0) if step.of is None else (step.of.dtype, step.of.offset)
        yield from _contiguous(spec.name, first, dtype, target, limit)
        return
    if _pays_by_runs(step.of):
        for index, first in runs(step.of)[1]:
            yield from _contiguous(spec.name, first, step.of.dtype, target[index], limit)
    else:
        yield from _strided(spec.name, step.of, target, limit)


def read_nbytes(step: Copy, spec: TensorSpec) -> int:
    """How many bytes the reads of one copy take from the source, those between short runs included."""
    if step.of is None:
        return spec.nbytes
    if contiguous(step.of) or _pays_by_runs(step.of):
        return step.of.nbytes
    start, stop = extent(step.of)
    return stop - start


def _pays_by_runs(box: Box) -> bool:
    inner, _ = runs(box)
    nbytes = math.prod(box.shape[len(box.shape) - inner :]) * box.dtype.itemsize
    return nbytes >= _RUN and 0 not in box.stride


def _contiguous(name: str, first: int, dtype: torch.dtype, target: torch.Tensor, limit: int) -> Iterator[Read]:
    """Read the bytes of the source from ``first`` on; they are ``target`` in row-major order."""
    if target.is_cpu and target.dtype == dtype and target.is_contiguous():
        if target.nbytes >= _LARGE:
            advise_huge_pages(target)
        yield Read(name, first, target.nbytes, target)
        return
    for index, at, shape in pieces(tuple(target.shape), limit // dtype.itemsize):
        piece = target[index]
        nbytes = piece.numel() * dtype.itemsize
        yield Read(name, first + at * dtype.itemsize, nbytes, _copy_into(piece, Box(dtype, shape, (), 0)))


def _strided(name: str, box: Box, target: torch.Tensor, limit: int) -> Iterator[Read]:
    """Read a box with short runs: all bytes from its first to its last, in parts that fit."""
    start, stop = extent(box)
    if stop - start <= limit:
        yield Read(name, start, stop - start, _copy_into(target, box, start))
        return
    dims = range(len(box.shape))
    longest = max((dim for dim in dims if box.shape[dim] > 1), key=lambda dim: box.stride[dim] * box.shape[dim])
    half = box.shape[longest] // 2
    for start, length in ((0, half), (half, box.shape[longest] - half)):
        begin = tuple(start if dim == longest else 0 for dim in dims)
        shape = tuple(length if dim == longest else box.shape[dim] for dim in dims)
        yield from _strided(name, narrowed(box, begin, shape), target.narrow(longest, start, length), limit)


def _copy_into(target: torch.Tensor, box: Box, start: int | None = None) -> Sink:
    """A sink that copies its bytes into ``target``: they are ``box``, whose byte ``start`` is their first.

    Without ``start`` they are the elements of ``box`` one behind the other.
    """

    entered = as_here(target.device)

    @held  # Else a signal might leave autograd off.
    def sink(raw: torch.Tensor) -> Event | None:
        if raw.data_ptr() % box.dtype.itemsize:
            raw = raw.clone()  # A file may pack a float32 behind three bytes; torch cannot view that in place.
        # Grad mode belongs to a thread, and a sink may be called in any.
        with entered(), torch.inference_mode() if target.is_inference() else torch.no_grad():
            if start is None:
                seen = raw.view(box.dtype).view(box.shape)
            else:
                seen = view(raw, Box(box.dtype, box.shape, box.stride, box.offset - start))
            target.copy_(seen, non_blocking=True)
            return record_event(target.device)

    return sink
