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
        ranges: dict[torch.device, set[tuple[int, int]]] = defaultdict(set)
        for tensor in tensors:
            for part in _parts(tensor):
                ranges[part.device].add(_extent(part))
        self._starts: dict[torch.device, list[int]] = {}
        self._stops: dict[torch.device, list[int]] = {}
        for device, several in ranges.items():
            starts, stops = list[int](), list[int]()
            self._starts[device], self._stops[device] = starts, stops
            for start, stop in sorted(several):
                if stops and start <= stops[-1]:
                    stops[-1] = max(stop, stops[-1])
                else:
                    starts.append(start)
                    stops.append(stop)

    def meets(self, tensor: torch.Tensor) -> bool:
        """Whether any byte of them lies between the tensor's first and last."""
        return bool(self._starts) and any(map(self._meets, _parts(tensor)))

    def _meets(self, part: torch.Tensor) -> bool:
        starts = self._starts.get(part.device)
        if starts is None:
            return False
        start, stop = _extent(part)
        before = bisect_left(starts, stop) - 1  # the last range that begins before the tensor ends
        return before >= 0 and self._stops[part.device][before] > start


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors with bytes that it consists of: itself, or those inside a wrapper."""
    return [tensor] if has_bytes(tensor) else [part for _, part in leaves("", tensor) if has_bytes(part)]


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
