"""Digests of a model's tensors, which tell whether values have changed."""

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
    """xxh3 of the values, dtype and shape of each named tensor. Names that ``tensors`` does not have are left out."""
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
    pairs = (pair for name, tensor in survey(model).tensors.items() for pair in leaves(name, tensor))
    tensors = {name: tensor for name, tensor in pairs if not nn.parameter.is_lazy(tensor) and not is_wrapper(tensor)}
    each = digests(tensors, tensors)
    whole = xxhash.xxh3_128("".join(f"{name} {digest}\n" for name, digest in sorted(each.items())).encode())
    return Digest(whole.hexdigest(), each)
