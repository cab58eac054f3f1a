"""Exchange: two tensors get each other's bytes, a piece at a time, so that no copy of a whole one is needed."""

from __future__ import annotations

import ctypes
from collections import deque

import torch

from .copies import is_one_block, move, on_threads, pieces_of
from .host import copy_bytes

_PIECE = 256 * 1024  # elements, or bytes of host memory; what lies between them stays in a cache


def exchange_bytes(first: torch.Tensor, second: torch.Tensor) -> None:
    """Exchange the values of two tensors of one dtype and shape that share no memory. Unseen by autograd.

    If it fails, both hold what they held, as far as they can still be written.
    """
    if is_one_block(first, second):
        on_threads(deque(pieces_of(first, second, _PIECE)), _exchange_at)
        return
    pieces = [(first, second)]
    if first.is_contiguous() and second.is_contiguous():
        halves = (torch.split(tensor.detach().view(-1), _PIECE) for tensor in (first, second))
        pieces = list(zip(*halves, strict=True))
    for number, (one, other) in enumerate(pieces):
        try:
            _exchange(one, other)
        except BaseException:
            for done in pieces[:number]:
                _exchange(*done)
            raise


def _exchange_at(one: int, other: int, nbytes: int) -> None:
    kept = ctypes.create_string_buffer(nbytes)
    move(ctypes.addressof(kept), one, nbytes)
    move(one, other, nbytes)
    move(other, ctypes.addressof(kept), nbytes)


def _exchange(one: torch.Tensor, other: torch.Tensor) -> None:
    kept = torch.empty_like(one)
    copy_bytes(kept, one)
    try:
        copy_bytes(one, other)
        copy_bytes(other, kept)
    except BaseException:
        copy_bytes(one, kept)
        raise
