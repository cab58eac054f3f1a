"""Filling: a rank copies boxes of its tensors into a slot."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from msgspec.structs import replace
from xxhash import xxh3_64_intdigest

from ...boxes import Box, row_major, view
from ...memory.addresses import buffer
from ..copying import flat, put
from .holding import Holding
from .words import Patch, Task

_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def fill(memory: torch.Tensor, tasks: Sequence[Task], held: Holding) -> tuple[int, ...]:
    """Do the tasks; the digests of those that are hashed, in their order.

    Args:
        memory: the slot, ``uint8``.
        tasks: what to do.
        held: what this rank holds.
    """
    digests = []
    for task in tasks:
        digest, one = None, len(task.patches) == 1
        for patch in task.patches:
            tensor, dtype = held.tensors[row := task.rows[patch.row]], held.dtypes[row]
            dtype = getattr(torch, task.dtype) if task.dtype else dtype
            there = replace(patch, into=task.start + patch.into)
            digest = _copy(memory, *_cast(there, tensor, dtype), hashed=task.hashed and one)
        if task.hashed:
            digests.append(digest_of(memory, task.start, task.nbytes) if digest is None else digest)
    return tuple(digests)


def digest_of(memory: torch.Tensor, start: int, nbytes: int) -> int:
    """The digest of what lies in a slot."""
    return xxh3_64_intdigest(buffer(memory.data_ptr() + start, nbytes))


def _cast(patch: Patch, tensor: torch.Tensor, dtype: torch.dtype) -> tuple[Patch, torch.Tensor]:
    """The patch, and the tensor that it is of; where another dtype is sent, the box alone, as that."""
    if tensor.dtype == dtype:
        return patch, tensor
    box = tuple(slice(at, at + length) for at, length in zip(patch.begin, patch.lengths[:-1], strict=False))
    begin = (*(0 for _ in box), patch.begin[-1])
    return replace(patch, begin=begin), tensor[box].to(dtype)


def _copy(memory: torch.Tensor, patch: Patch, tensor: torch.Tensor, *, hashed: bool) -> int | None:
    begin = patch.begin[:-1]
    *lengths, width = patch.lengths
    item, strides = tensor.element_size(), patch.strides
    if width < item:
        _as_bytes(memory, patch, tensor)
    else:
        part = tensor[tuple(slice(at, at + length) for at, length in zip(begin, lengths, strict=True))]
        if strides == row_major(patch.lengths) and (part.is_contiguous() or patch.into % item == 0):
            nbytes = part.numel() * item
            return put(flat(part), memory[patch.into : patch.into + nbytes], hashed=hashed)
        if any(stride % item for stride in (*strides[:-1], patch.into)):
            _as_bytes(memory, patch, tensor)
        else:
            plain = _SAME_WIDTH[item]
            steps = tuple(stride // item for stride in strides[:-1])
            view(memory, Box(plain, tuple(lengths), steps, patch.into)).copy_(part.view(plain))
    return digest_of(memory, patch.into, math.prod(patch.lengths)) if hashed else None


def _as_bytes(memory: torch.Tensor, patch: Patch, tensor: torch.Tensor) -> None:
    """Where not whole elements are copied, or they go where no element may begin."""
    item = tensor.element_size()
    strides = (*(stride * item for stride in tensor.stride()), 1)
    skip = sum(at * stride for at, stride in zip(patch.begin, strides, strict=True))
    there = Box(torch.uint8, patch.lengths, strides, skip)
    view(memory, Box(torch.uint8, patch.lengths, patch.strides, patch.into)).copy_(view(tensor, there))
