"""Copies: many copies of host memory as one, in large pieces, without the threads of torch."""

# torch's threads meet after each tensor that is not tiny. Where another process holds up one, all wait each time.

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import torch

from .host import copy_bytes

_SMALL = 256 * 1024  # bytes; copied sooner than another Python thread would give the interpreter back
_PIECE = 8 * 1024 * 1024  # bytes; a thread that is held up keeps the others waiting for one
_WORTH = 32 * 1024 * 1024  # bytes for each thread
_THREADS = 8  # more are no faster: they wait for the memory

_THREADED = 64 * 1024  # bytes; smaller ones torch copies without threads

Piece = tuple[int, int, int]
"""Where to, where from, and how many bytes."""


def _memmove(library: ctypes.CDLL) -> ctypes._NamedFuncPointer:
    function = library.memmove
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_void_p
    return function


move = _memmove(ctypes.CDLL(None))
_move_at_once = _memmove(ctypes.PyDLL(None))  # It keeps the interpreter.


def copy_all(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy the second tensor of each pair into the first, unseen by autograd. ``_version`` may stay as it is."""
    pieces: deque[Piece] = deque()
    for target, value in pairs:
        if not is_one_block(target, value):
            copy_bytes(target, value)
        elif target.nbytes <= _SMALL:
            _move_at_once(target.data_ptr(), value.data_ptr(), target.nbytes)
        else:
            pieces.extend(pieces_of(target, value, _PIECE))
    on_threads(pieces, move)


def copy_alone(target: torch.Tensor, value: torch.Tensor) -> None:
    """``copy_queued`` without torch's threads."""
    if spares_threads(target, value):
        copy_all([(target, value)])
    else:
        copy_queued(target, value)


def copy_queued(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy one tensor where the calling code has autograd off. The device of ``target`` may still read ``value`` then.

    What goes to the host is there when this returns: a later event of the host's is none.
    """
    target.copy_(value, non_blocking=not target.is_cpu)


def spares_threads(target: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether ``copy_all`` can do for torch, and torch would use threads."""
    return target.nbytes > _THREADED and is_one_block(target, value)


def pieces_of(target: torch.Tensor, value: torch.Tensor, size: int) -> Iterator[Piece]:
    """Two tensors that are one block each, in pieces of at most ``size`` bytes."""
    to, start, nbytes = target.data_ptr(), value.data_ptr(), target.nbytes
    return ((to + at, start + at, min(size, nbytes - at)) for at in range(0, nbytes, size))


def is_one_block(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether both lie in host memory without gaps and a copy changes no bit: then it is one of bytes."""
    first, second = first.detach(), second.detach()
    return (
        type(first) is type(second) is torch.Tensor
        and (first.dtype, first.shape) == (second.dtype, second.shape)
        and all(
            tensor.layout is torch.strided and tensor.is_cpu and tensor.is_contiguous() and not tensor.is_quantized
            for tensor in (first, second)
        )
        and (first.is_conj(), first.is_neg()) == (second.is_conj(), second.is_neg())
    )


def on_threads(pieces: deque[Piece], work: Callable[[int, int, int], object]) -> None:
    """Do the work for all pieces, on as many threads as torch may use and as is worth while."""
    worth = sum(nbytes for _, _, nbytes in pieces) // _WORTH
    count = min(torch.get_num_threads(), _THREADS, worth)
    started = []
    try:
        with suppress(RuntimeError):  # No more threads can be had: those that are there do the rest.
            for _ in range(count - 1):
                thread = threading.Thread(target=_work_off, args=(pieces, work))
                thread.start()
                started.append(thread)
        _work_off(pieces, work)
    finally:
        for thread in started:
            thread.join()


def _work_off(pieces: deque[Piece], work: Callable[[int, int, int], object]) -> None:
    while True:
        try:
            piece = pieces.popleft()
        except IndexError:
            return
        work(*piece)
