"""Addresses: memory by its address, without torch. Who takes the memory is elsewhere."""

from __future__ import annotations

import ctypes
import mmap

PAGE = mmap.PAGESIZE


def buffer(address: int, nbytes: int) -> ctypes.Array[ctypes.c_char]:
    """A writable buffer over memory that somebody else owns. The caller keeps the owner alive while using it."""
    return (ctypes.c_char * nbytes).from_address(address)
