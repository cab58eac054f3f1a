"""Splitting tensors into parts that fit into a slot, and copying them with their digest. It knows no receiver."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from xxhash import xxh3_64

from ..memory import buffer

__all__ = ["copy_hashed", "flat", "parts", "put"]

_CHUNK = 512 * 1024  # bytes; what was just copied is still in the cache when it is hashed
_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Something to copy from: the same bytes in row-major order, ``uint8 [nbytes]`` where they lie so already."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.is_contiguous():
        return plain.reshape(-1).view(torch.uint8)
    return plain.view(_SAME_WIDTH[plain.element_size()])  # Not every dtype can be copied; these can.


def parts(tensor: torch.Tensor, limit: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Split what ``flat`` gave: ``(start, view)`` of at most ``limit`` bytes, in row-major order; never a copy."""
    if tensor.nbytes <= limit:
        yield 0, tensor
        return
    each = tensor.nbytes // tensor.shape[0]
    rows = limit // each
    if rows:
        for first in range(0, tensor.shape[0], rows):
            yield first * each, tensor[first : first + rows]
        return
    for index in range(tensor.shape[0]):
        for start, part in parts(tensor[index], limit):
            yield index * each + start, part


def put(part: torch.Tensor, memory: torch.Tensor, digest: xxh3_64 | None) -> None:
    """Copy a part into ``memory``, ``uint8 [part.nbytes]``; the digest goes over what the part holds."""
    if part.dtype is torch.uint8 and part.ndim == 1 and part.is_cpu and part.is_contiguous():
        copy_hashed(part, memory, digest, of=part)
        return
    memory.view(part.dtype).view(part.shape).copy_(part)
    if digest is not None:
        digest.update(buffer(memory.data_ptr(), memory.numel()))


def copy_hashed(part: torch.Tensor, memory: torch.Tensor, digest: xxh3_64 | None, *, of: torch.Tensor) -> None:
    """Copy bytes; the digest goes over ``of``, which is one of the two."""
    if digest is None:
        memory.copy_(part)
        return
    for start in range(0, part.numel(), _CHUNK):
        stop = min(start + _CHUNK, part.numel())
        memory[start:stop].copy_(part[start:stop])
        digest.update(buffer(of.data_ptr() + start, stop - start))
