"""Digests of tensors of a model."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import xxhash
from torch import nn

from ..memory.wrappers import is_wrapper, leaves
from .survey import survey


def digests(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> dict[str, str]:
    """Digests (xxh3) of the values of the named tensors, with what they are; of those that are not there, nothing."""
    return {name: _digest(tensors[name]) for name in names if name in tensors}


def _digest(tensor: torch.Tensor) -> str:
    digest = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if not tensor.is_meta and tensor.numel():
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update((ctypes.c_char * values.numel()).from_address(values.data_ptr()))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Digest:
    """What a model holds.

    Attributes:
        whole: xxh3 of all tensors, names included.
        tensors: xxh3 of each parameter and buffer, by name; of a wrapper, of the tensors inside.
    """

    whole: str
    tensors: Mapping[str, str]


def digest_of(model: nn.Module) -> Digest:
    """Digests of all parameters and buffers of a model."""
    found = (pair for name, one in survey(model).tensors.items() for pair in leaves(name, one))
    tensors = {name: one for name, one in found if not nn.parameter.is_lazy(one) and not is_wrapper(one)}
    each = digests(tensors, tensors)
    whole = xxhash.xxh3_128("".join(f"{name} {one}\n" for name, one in sorted(each.items())).encode())
    return Digest(whole.hexdigest(), each)
