"""Aliases: which tensors share memory, and which of them owns it. It compares addresses and writes nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import cache, partial

import torch

from .regions import Box, box_of, extent

__all__ = ["homes", "overlaps", "owners"]


def owners(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For every name the first name of the same tensor: itself, unless it is tied.

    The same tensor means the same memory seen the same way; on meta, where there is no memory, the same
    object. Tensors of no bytes are nobody's.
    """
    first: dict[Hashable, str] = {}
    return {name: first.setdefault(_identity(tensor), name) for name, tensor in tensors.items()}


def _identity(tensor: torch.Tensor) -> Hashable:
    if not _has_address(tensor) or tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _has_address(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) and tensor.layout is torch.strided


def overlaps(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    """Pairs of names whose tensors share bytes without being the same tensor.

    One sorted pass over address ranges; only tensors whose ranges meet are compared, strided ones byte by byte.
    """
    devices = {tensor.device for tensor in tensors.values()}
    spelled = {device: str(device) for device in devices}  # Once each: that costs as much as all else here.
    spans = sorted(
        (
            (spelled[tensor.device], *_extent(tensor), name)
            for name, tensor in tensors.items()
            if _has_address(tensor) and not tensor.is_meta and tensor.numel()
        ),
        key=lambda span: (span[0], span[1], -span[2]),  # Of two that begin together the larger comes first.
    )
    open_spans: list[tuple[str, int, int, str]] = []  # Those seen so far that reach past the one at hand.
    for span in spans:
        device, start, _, name = span
        open_spans = [other for other in open_spans if other[0] == device and start < other[2]]
        for *_, other in open_spans:
            if _identity(tensors[other]) != _identity(tensors[name]) and _share_bytes(tensors[other], tensors[name]):
                yield other, name
        open_spans.append(span)


def homes(tensors: Mapping[str, torch.Tensor]) -> Callable[[str, Box], list[tuple[str, Box]]]:
    """A function that says which tensors the bytes of a box belong to, where several lie side by side in one storage.

    It takes a name and a box counted from that tensor's first byte, which may reach beyond the tensor, and returns
    names with boxes counted from theirs: one if the box lies within one tensor, else the bytes in each.
    """
    found = cache(partial(_side_by_side, tensors))  # Plans of whole tensors, most of all, never ask.

    def home(name: str, box: Box) -> list[tuple[str, Box]]:
        base, neighbours = found()
        several = neighbours.get(name, ())
        if len(several) < 2:
            return [(name, box)]
        start, stop = (base[name] + at for at in extent(box))
        for low, high, other in several:
            if low <= start and stop <= high:
                return [(other, Box(box.dtype, box.shape, box.stride, box.offset + base[name] - base[other]))]
        parts = [(max(start, low), min(stop, high), other) for low, high, other in several]
        inside = [(other, Box(torch.uint8, (b - a,), (1,), a - base[other])) for a, b, other in parts if a < b]
        return inside or [(name, box)]

    return home


def _side_by_side(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, int], dict[str, list[tuple[int, int, str]]]]:
    """Of each tensor its first byte within its storage, and what lies there: first and last byte, and name."""
    plain = {name: tensor for name, tensor in tensors.items() if _has_address(tensor) and tensor.numel()}
    base = {name: int(one.storage_offset()) * one.element_size() for name, one in plain.items()}
    storages: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    neighbours = {name: storages[one.untyped_storage()._cdata] for name, one in plain.items()}
    for name, owner in owners(plain).items():
        if owner == name:
            neighbours[name].append((*extent(box_of(plain[name])), name))
    return base, neighbours


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    if tensor.is_contiguous():
        return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _share_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.is_contiguous() and other.is_contiguous():
        return True
    base = min(one.data_ptr(), other.data_ptr())
    touched = torch.zeros(max(_extent(one)[1], _extent(other)[1]) - base, dtype=torch.bool)
    _bytes_of(touched, one, base).fill_(True)
    return bool(_bytes_of(touched, other, base).any())


def _bytes_of(touched: torch.Tensor, tensor: torch.Tensor, base: int) -> torch.Tensor:
    size = tensor.element_size()
    return touched.as_strided(
        (*tensor.shape, size), (*(s * size for s in tensor.stride()), 1), tensor.data_ptr() - base
    )
