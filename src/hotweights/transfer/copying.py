"""Copying: parts of tensors into slots and out of them, with digests of what was copied."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from xxhash import xxh3_64, xxh3_64_intdigest

from ..errors import UsageError
from ..memory.addresses import buffer
from ..memory.wrappers import is_wrapper
from ..ranges import Range

_BLOCK = 512 * 1024  # bytes; what was just copied is still in the L2 cache when it is hashed
_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """A view to copy from: ``uint8 [nbytes]`` if the tensor is contiguous, else its shape with a dtype of its width.

    Raises:
        UsageError: it is a wrapper, whose bytes lie in other tensors.
    """
    if is_wrapper(tensor):  # Its address is null, and reading there would kill the process.
        raise UsageError(wrapped(tensor))
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.is_contiguous():
        return plain.reshape(-1).view(torch.uint8)
    return plain.view(_SAME_WIDTH[plain.element_size()])  # Torch cannot copy every dtype; these it can.


def wrapped(tensor: torch.Tensor) -> str:
    """The message for a wrapper that was to be sent."""
    return f"a {type(tensor).__name__} has no bytes of its own; send what it holds, or its full_tensor()"


def parts(tensor: torch.Tensor, limit: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Split what ``flat`` gave into ``(first byte, view)`` of at most ``limit`` bytes, in row-major order."""
    if tensor.nbytes <= limit:
        yield 0, tensor
        return
    row_nbytes = tensor.nbytes // tensor.shape[0]
    rows = limit // row_nbytes
    if rows:
        for first in range(0, tensor.shape[0], rows):
            yield first * row_nbytes, tensor[first : first + rows]
        return
    for index in range(tensor.shape[0]):
        for start, part in parts(tensor[index], limit):
            yield index * row_nbytes + start, part


def over(memory: torch.Tensor, part: Range) -> torch.Tensor:
    """A view of a range within ``uint8 [n]``: ``[part.nbytes]`` if it is one run, else ``[count, nbytes of a run]``."""
    if part.count == 1:
        return memory[part.start : part.stop]
    return memory.as_strided((part.count, part.nbytes), (part.stride, 1), int(memory.storage_offset()) + part.start)


def put(part: torch.Tensor, memory: torch.Tensor, *, hashed: bool) -> int | None:
    """Copy a part into ``memory``, ``uint8 [part.nbytes]``. Returns the digest of what the part holds, if hashed."""
    if part.dtype is torch.uint8 and part.is_cpu and part.is_contiguous():
        return _copy(part, memory, part if hashed else None)
    memory.view(part.dtype).view(part.shape).copy_(part)
    return xxh3_64_intdigest(_bytes(memory, 0, memory.numel())) if hashed else None


def copy_out(raw: torch.Tensor, room: torch.Tensor, *, hashed: bool) -> int | None:
    """Copy ``uint8 [n]`` into ``room`` of as many bytes. Returns the digest of what lies there then, if hashed."""
    if room.is_contiguous():
        return _copy(raw, room, room if hashed else None)
    runs = raw.view(room.shape)
    if not hashed:
        room.copy_(runs)
        return None
    digest, step = xxh3_64(), max(1, _BLOCK // room.shape[1])
    for row in range(0, room.shape[0], step):
        # Copied twice: the sender could write to the slot between the copy and the hash, and nobody would notice.
        private = runs[row : row + step].clone()
        digest.update(_bytes(private, 0, private.numel()))
        room[row : row + step].copy_(private)
    return digest.intdigest()


def widen(raw: torch.Tensor, dtype: torch.dtype, room: torch.Tensor, *, hashed: bool) -> int | None:
    """Copy elements of ``dtype``, ``uint8 [n]``, into room for as many of a wider one. Returns their digest."""
    digest, item, place = xxh3_64(), dtype.itemsize, room.view(-1, room.shape[-1])
    run = place.shape[1] * item
    rows = max(1, _BLOCK // run)
    for row in range(0, place.shape[0], rows):
        lines = raw[row * run : (row + rows) * run].view(-1, run)
        for start in range(0, run, _BLOCK):
            part = lines[:, start : start + _BLOCK]
            if hashed:
                part = part.clone()  # As in ``copy_out``: what is hashed is what is used.
                digest.update(_bytes(part, 0, part.numel()))
            into = place[row : row + rows, start // item : (start + part.shape[1]) // item]
            into.copy_(part.contiguous().view(dtype))
    return digest.intdigest() if hashed else None


def _copy(source: torch.Tensor, target: torch.Tensor, hashed: torch.Tensor | None) -> int | None:
    """Copy contiguous host bytes; returns the digest of ``hashed``. (``copy_`` refuses inference tensors.)"""
    into, of, nbytes = target.data_ptr(), source.data_ptr(), source.numel()
    if hashed is None:
        ctypes.memmove(into, of, nbytes)
        return None
    if nbytes <= _BLOCK:
        ctypes.memmove(into, of, nbytes)
        return xxh3_64_intdigest(_bytes(hashed, 0, nbytes))
    digest = xxh3_64()
    for start in range(0, nbytes, _BLOCK):
        count = min(_BLOCK, nbytes - start)
        ctypes.memmove(into + start, of + start, count)
        digest.update(_bytes(hashed, start, count))
    return digest.intdigest()


def _bytes(memory: torch.Tensor, start: int, nbytes: int) -> ctypes.Array[ctypes.c_char]:
    return buffer(memory.data_ptr() + start, nbytes)
