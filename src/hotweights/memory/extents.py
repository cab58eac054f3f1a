"""Extents: the address ranges that some tensors take, and which other tensors reach into them."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable

import torch

from ..boxes import box_of, extent
from .aliases import has_bytes
from .wrappers import leaves


class Extents:
    """Where some tensors lie, from the first byte of each to its last. It keeps no tensor alive.

    Memory is told by its address: two tensors may share bytes and have no storage in common, as after ``numpy()``.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        extents: dict[torch.device, list[tuple[int, int]]] = defaultdict(list)
        for tensor in tensors:
            for part in (tensor,) if has_bytes(tensor) else _inside(tensor):
                extents[part.device].append(_extent(part))
        self._ranges = {device: _merged(several) for device, several in extents.items()}

    def meets(self, tensor: torch.Tensor) -> bool:
        """Whether any byte of them lies between the tensor's first and last."""
        return self._meets(tensor) if has_bytes(tensor) else any(map(self._meets, _inside(tensor)))

    def _meets(self, part: torch.Tensor) -> bool:
        ranges = self._ranges.get(part.device)
        if ranges is None:
            return False
        starts, stops = ranges
        start, stop = _extent(part)
        before = bisect_left(starts, stop) - 1  # the last range that begins before the tensor ends
        return before >= 0 and stops[before] > start


def _merged(extents: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Where ranges start and stop, ascending and apart."""
    starts: list[int] = []
    stops: list[int] = []
    last = -1
    for start, stop in sorted(extents):
        if start > last:
            starts.append(start)
            stops.append(stop)
            last = stop
        elif stop > last:
            stops[-1] = last = stop
    return starts, stops


def _inside(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors with bytes inside a wrapper."""
    return [part for _, part in leaves("", tensor) if has_bytes(part)]


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    box = box_of(tensor)
    return start, start + extent(box)[1] - box.offset


def renew(written: Iterable[torch.Tensor], tensors: Iterable[torch.Tensor]) -> None:
    """Give every one of ``tensors`` that has a byte among the ``written`` a new ``_version``, and the written ones too.

    Bytes that are written by address leave it as it was: a cache keyed by it would serve old weights, and autograd
    would compute gradients with new ones. Tensors made under inference mode have none.
    """
    known = {id(tensor): tensor for tensor in written}
    others = [tensor for tensor in tensors if id(tensor) not in known]
    if others:
        extents = Extents(known.values())
        known |= {id(tensor): tensor for tensor in others if extents.meets(tensor)}
    torch.autograd.graph.increment_version([*known.values()])
