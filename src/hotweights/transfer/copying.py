"""Copying parts of tensors between slots and other memory, with digests. It knows neither messages nor receivers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from xxhash import xxh3_64, xxh3_64_intdigest

from ..errors import UsageError
from ..memory.host import buffer
from ..memory.wrappers import is_wrapper
from ..ranges import Range

_BLOCK = 512 * 1024  # bytes; what was just copied is still in the second cache when it is hashed
_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Something to copy from: the same bytes in row-major order, ``uint8 [nbytes]`` where they lie so already.

    Raises:
        UsageError: it is a wrapper, whose bytes lie in other tensors.
    """
    if is_wrapper(tensor):  # Its address is null: reading there kills the process.
        raise UsageError(wrapped(tensor))
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.is_contiguous():
        return plain.reshape(-1).view(torch.uint8)
    return plain.view(_SAME_WIDTH[plain.element_size()])  # Not every dtype can be copied; these can.


def wrapped(tensor: torch.Tensor) -> str:
    """What to say of a wrapper that was to be sent."""
    return f"a {type(tensor).__name__} has no bytes of its own; send what it holds, or its full_tensor()"


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


def over(memory: torch.Tensor, one: Range) -> torch.Tensor:
    """The bytes of a range within ``uint8 [n]``: of one dimension where they lie together, else runs by bytes."""
    if one.count == 1:
        return memory[one.start : one.stop]
    return memory.as_strided((one.count, one.nbytes), (one.stride, 1), int(memory.storage_offset()) + one.start)


def put(part: torch.Tensor, memory: torch.Tensor, *, hashed: bool) -> int | None:
    """Copy a part into ``memory``, ``uint8 [part.nbytes]``; the digest of what the part holds, if it is wanted."""
    if part.dtype is torch.uint8 and part.is_cpu and part.is_contiguous():
        return _copy(part, memory, part if hashed else None)
    memory.view(part.dtype).view(part.shape).copy_(part)
    return xxh3_64_intdigest(_bytes(memory, 0, memory.numel())) if hashed else None


def copy_out(raw: torch.Tensor, room: torch.Tensor, *, hashed: bool) -> int | None:
    """Copy ``uint8 [n]`` into room of as many bytes; the digest of what lies there then, if it is wanted."""
    if room.is_contiguous():
        return _copy(raw, room, room if hashed else None)
    runs = raw.view(room.shape)
    if not hashed:
        room.copy_(runs)
        return None
    digest, step = xxh3_64(), max(1, _BLOCK // room.shape[1])
    for row in range(0, room.shape[0], step):
        # Copied twice: what is hashed must be what is used, and nobody else may be able to write to it.
        private = runs[row : row + step].clone()
        digest.update(_bytes(private, 0, private.numel()))
        room[row : row + step].copy_(private)
    return digest.intdigest()


def _copy(source: torch.Tensor, target: torch.Tensor, hashed: torch.Tensor | None) -> int | None:
    """Between contiguous bytes of the host; autograd and inference mode are none of its business."""
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
