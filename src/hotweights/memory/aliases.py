"""Aliases: which tensors share memory, and which of them owns it. Compares addresses."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping

import torch

from ..boxes import Box, extent, meeting, share_bytes


def owners(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For every name the first name of the same tensor: itself, unless it is tied.

    The same tensor means the same memory seen the same way. A tensor of no bytes is tied to none.
    """
    places = {name: _place(tensor) for name, tensor in tensors.items()}
    several = Counter(places.values())
    first: dict[Hashable, str] = {}
    return {
        name: name if several[place] == 1 else first.setdefault(_identity(tensors[name]), name)
        for name, place in places.items()
    }


def _place(tensor: torch.Tensor) -> Hashable:
    return _where(tensor) if plain(tensor) and tensor.numel() else id(tensor)


def _identity(tensor: torch.Tensor) -> Hashable:
    # A conjugated or negated view has the bytes of another tensor, and other values.
    return (_place(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())


def plain(tensor: torch.Tensor) -> bool:
    """Whether it has bytes of its own, and no code stands between them and whoever reads it."""
    kind = type(tensor)  # Every tensor is asked several times, and nearly all are of these classes.
    if kind not in _PLAIN and (kind.__torch_dispatch__ is not _NO_DISPATCH or torch.nn.parameter.is_lazy(tensor)):
        return False
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)


def has_bytes(tensor: torch.Tensor) -> bool:
    """Whether it lies in plain memory: it is not lazy, sparse, on meta, empty or a wrapper."""
    return plain(tensor) and not tensor.is_meta and tensor.numel() > 0


_PLAIN = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}
_NO_DISPATCH = torch._C._disabled_torch_dispatch_impl


def _where(tensor: torch.Tensor) -> tuple[Hashable, int]:
    """Which memory it lies in, and its first byte there. On meta, which has no addresses, every storage is a memory."""
    if tensor.is_meta:
        return ("meta", tensor.untyped_storage()._cdata), int(tensor.storage_offset()) * tensor.element_size()
    return tensor.device, tensor.data_ptr()


def overlaps(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    """Pairs of names whose tensors share bytes without being the same tensor.

    Only tensors whose address ranges meet are compared with each other: strided ones byte by byte.
    """
    spans: dict[Hashable, list[tuple[int, int, str]]] = defaultdict(list)
    for name, tensor in tensors.items():
        if plain(tensor) and tensor.numel():
            memory, start = _where(tensor)
            nbytes = tensor.nbytes if tensor.is_contiguous() else extent(_box(tensor))[1] - start
            spans[memory].append((start, start + nbytes, name))
    for of_one_memory in spans.values():
        for name, other in meeting(of_one_memory):
            tensor, beside = tensors[name], tensors[other]
            if _identity(tensor) != _identity(beside) and share_bytes(_box(tensor), _box(beside)):
                yield name, other


def _box(tensor: torch.Tensor) -> Box:
    """The tensor as a box over its memory; the offset is its address."""
    return Box(tensor.dtype, tuple(tensor.shape), tensor.stride(), _where(tensor)[1])


def spots(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, int]]:
    """Where tensors lie that have a storage together with others, which they may overlap or lie beside.

    For each the name of the first tensor in that storage, and its first byte, counted from that of the lowest of them.
    """
    several: dict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if plain(tensor) and tensor.numel():
            several[tensor.untyped_storage()._cdata].append(name)
    spot: dict[str, tuple[str, int]] = {}
    for names in several.values():
        if len(names) > 1 and len({_identity(tensors[name]) for name in names}) > 1:
            first = {name: int(tensors[name].storage_offset()) * tensors[name].element_size() for name in names}
            lowest = min(first.values())
            spot.update({name: (names[0], at - lowest) for name, at in first.items()})
    return spot
