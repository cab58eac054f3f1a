"""Cache: a directory of one host in which processes share what they have read of objects, so that each byte comes once.

It holds blocks of objects, each with its digest: what is damaged is read again. A block is written under another name
first, and whoever reads it for the others holds a lock that ends with its process: nothing waits for the dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import re
import secrets
import stat
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import xxhash

from ...errors import UsageError
from ...notices import log
from .service import Pin

BLOCK = 8 * 1024 * 1024
"""Bytes of a block; the last one of an object has fewer."""
LIMIT = 100 * 1000**3
"""Bytes of a cache, unless its users say otherwise."""
_OBJECT = re.compile(r"[0-9a-f]{40}")
_DIGEST = 16  # bytes, at a block's end
_ASK = 0.02  # seconds between two looks whether somebody else has read a block
_DEAD = 600.0  # seconds after which a file that was not finished is nobody's


class Cache:
    """Blocks of objects in a directory. Any number of processes use one; each gives it the same limit.

    Args:
        folder: is made, for this user alone.
        limit: bytes that it may hold; what was not read for longest goes first.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        self._folder, self._limit = Path(folder).expanduser().absolute(), limit
        try:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            status = os.stat(self._folder)
        except OSError as error:
            raise UsageError(f"cache_dir={str(folder)!r}: cannot be made: {error.strerror}") from error
        if status.st_uid != os.geteuid() or status.st_mode & 0o022 or not stat.S_ISDIR(status.st_mode):
            raise UsageError(
                f"cache_dir={str(folder)!r}: others may write there, and what lies there is loaded; name a directory "
                "of this user's alone, or one that does not exist"
            )
        self._written = limit  # Since the last look at what there is: so the first block looks.

    def holds(self, pin: Pin) -> bool:
        """Whether objects such as this are kept: not where nothing tells a version from a later one."""
        return pin.tag is not None or pin.modified is not None

    async def block(
        self, path: str, pin: Pin, number: int, read: Callable[[], Awaitable[bytearray]], patience: float
    ) -> memoryview:
        """A block of an object: from the directory, or by ``read``, which one process calls for all.

        Args:
            path: the object's address.
            pin: which version of it.
            number: which block.
            read: gets it from the store.
            patience: seconds to wait for another process that reads it; then this one does, too.
        """
        which = hashlib.sha1(repr((path, pin.size, pin.tag or pin.modified)).encode()).hexdigest()
        folder = self._folder / which
        nbytes = min(BLOCK, pin.size - number * BLOCK)
        until = time.monotonic() + patience
        while True:
            if (content := await asyncio.to_thread(_load, folder / str(number), nbytes)) is not None:
                return content
            lock = _lock(folder, number)
            if lock is not None or time.monotonic() > until:
                break
            await asyncio.sleep(_ASK)
        try:
            # It may have been written between the look and the lock.
            if (content := await asyncio.to_thread(_load, folder / str(number), nbytes)) is not None:
                return content
            fresh = await read()
            await asyncio.to_thread(self._keep, folder / str(number), fresh)
            return memoryview(fresh)
        finally:
            if lock is not None and lock >= 0:
                os.close(lock)

    def _keep(self, place: Path, content: bytes | bytearray) -> None:
        draft = place.with_name(f"{place.name}.{secrets.token_hex(4)}")
        try:
            with open(draft, "xb", opener=_private) as file:
                file.write(content)
                file.write(xxhash.xxh3_128_digest(content))
            os.replace(draft, place)
            self._written += len(content)
            if self._written * 32 >= self._limit:
                self._written = 0
                self._make_room()
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(draft)
            log(logging.WARNING, "%s keeps no more of objects: %s", self._folder, error.strerror)

    def _make_room(self) -> None:
        """Remove what was not read for longest, and what was not finished."""
        blocks = []
        now = time.time()
        for place in _files(self._folder):
            with contextlib.suppress(OSError):
                status = place.stat()
                if place.name.isdecimal():
                    blocks.append((status.st_mtime, status.st_size, place))
                elif place.name != "lock" and now - status.st_mtime > _DEAD:
                    os.unlink(place)
        excess = sum(nbytes for _, nbytes, _ in blocks) - self._limit
        for _, nbytes, place in sorted(blocks):
            if excess <= 0:
                break
            with contextlib.suppress(OSError):
                os.unlink(place)
            excess -= nbytes


def _files(folder: Path) -> list[Path]:
    """Every file of a version of an object. What else lies in the directory is somebody's."""
    files: list[Path] = []
    for name in os.listdir(folder):
        if _OBJECT.fullmatch(name):
            with contextlib.suppress(OSError):
                files += [folder / name / each for each in os.listdir(folder / name)]
    return files


def _load(place: Path, nbytes: int) -> memoryview | None:
    """A block, if it is there and whole. One that is damaged is removed."""
    try:
        with open(place, "rb") as file:
            content = file.read(nbytes + _DIGEST + 1)
            os.utime(file.fileno())  # It was read now.
    except OSError:
        return None
    block = memoryview(content)[:nbytes]  # No copy: many blocks are in memory at once.
    if len(content) != nbytes + _DIGEST or xxhash.xxh3_128_digest(block) != content[nbytes:]:
        with contextlib.suppress(OSError):
            os.unlink(place)
        return None
    return block


def _lock(folder: Path, number: int) -> int | None:
    """A descriptor that locks a block until it is closed, also by the process's death; ``None`` while another has it.

    Negative where the file system has no such locks: then several may read one block.
    """
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return -1
    # Of the open file, not of the process: two threads exclude each other, too.
    wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0)
    try:
        fcntl.fcntl(lock, fcntl.F_OFD_SETLK, wanted)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:
        os.close(lock)
        return -1
    return lock


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
