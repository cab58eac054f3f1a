"""Aliases: which tensors share memory, and which of them owns it. It compares addresses and writes nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from functools import cache

import torch


def owners(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For every name the first name of the same tensor: itself, unless it is tied.

    The same tensor means the same memory seen the same way. Tensors of no bytes are nobody's.
    """
    first: dict[Hashable, str] = {}
    return {name: first.setdefault(_identity(tensor), name) for name, tensor in tensors.items()}


def _identity(tensor: torch.Tensor) -> Hashable:
    if not plain(tensor) or tensor.numel() == 0:
        return id(tensor)
    return (*_where(tensor), tensor.dtype, tensor.shape, tensor.stride())


def plain(tensor: torch.Tensor) -> bool:
    """Whether it has bytes of its own, and no code between them and whoever reads it."""
    if type(tensor) not in _PLAIN and type(tensor).__torch_dispatch__ is not _NO_DISPATCH:
        return False
    return tensor.layout is torch.strided and not torch.nn.parameter.is_lazy(tensor)


def has_bytes(tensor: torch.Tensor) -> bool:
    """Whether it lies in plain memory of its own or others': not lazy, sparse, meta, empty or a wrapper."""
    return plain(tensor) and not tensor.is_meta and tensor.numel() > 0


_PLAIN = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}
_NO_DISPATCH = torch._C._disabled_torch_dispatch_impl
_spelled = cache(str)  # Spelling a device costs as much as all else here.


def _where(tensor: torch.Tensor) -> tuple[str, int]:
    """Which memory it lies in, and its first byte there. On meta, which has no addresses, every storage is a memory."""
    if tensor.is_meta:
        return f"meta {tensor.untyped_storage()._cdata}", int(tensor.storage_offset()) * tensor.element_size()
    return _spelled(tensor.device), tensor.data_ptr()


def overlaps(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    """Pairs of names whose tensors share bytes without being the same tensor.

    One sorted pass over address ranges; only tensors whose ranges meet are compared, strided ones byte by byte.
    """
    spans = sorted(
        ((*_extent(tensor), name) for name, tensor in tensors.items() if plain(tensor) and tensor.numel()),
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


def spots(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, int]]:
    """Where tensors lie that have a storage together with others, which they may overlap or lie beside.

    Gives the first name in that storage, and the tensor's first byte, counted from that of the lowest of them.
    """
    several: dict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if plain(tensor) and tensor.numel():
            several[tensor.untyped_storage()._cdata].append(name)
    found: dict[str, tuple[str, int]] = {}
    for names in several.values():
        if len(names) > 1 and len({_identity(tensors[name]) for name in names}) > 1:
            first = {name: int(tensors[name].storage_offset()) * tensors[name].element_size() for name in names}
            lowest = min(first.values())
            found.update({name: (names[0], at - lowest) for name, at in first.items()})
    return found


def _extent(tensor: torch.Tensor) -> tuple[str, int, int]:
    memory, start = _where(tensor)
    if tensor.is_contiguous():
        return memory, start, start + tensor.nbytes
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return memory, start, start + (last + 1) * tensor.element_size()


def _share_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.is_contiguous() and other.is_contiguous():
        return True
    base = min(_extent(one)[1], _extent(other)[1])
    touched = torch.zeros(max(_extent(one)[2], _extent(other)[2]) - base, dtype=torch.bool, device="cpu")
    _bytes_of(touched, one, base).fill_(True)
    return bool(_bytes_of(touched, other, base).any())


def _bytes_of(touched: torch.Tensor, tensor: torch.Tensor, base: int) -> torch.Tensor:
    size = tensor.element_size()
    return touched.as_strided(
        (*tensor.shape, size), (*(s * size for s in tensor.stride()), 1), _where(tensor)[1] - base
    )
