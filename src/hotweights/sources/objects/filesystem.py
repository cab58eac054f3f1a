"""Filesystem: a file system of ``fsspec``, asked as stores are. It is the caller's, and is only read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from .service import CHUNK, Body, Pin

# What file systems call what tells one version from another; the first that there is counts.
_TAGS = ("ETag", "etag", "e_tag", "md5Hash", "content_md5", "ino")
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")


class Filesystem:
    """A service whose calls block, in threads. One that is given up goes on by itself, and writes nothing of ours."""

    def __init__(self, files: Any) -> None:
        self._files = files

    async def get(self, key: str, start: int, stop: int, pin: Pin | None) -> Body:
        """See ``Service``. The pin is looked at after the bytes came: it tells of a file that was replaced before."""
        raw = await asyncio.to_thread(self._read, key, start, stop)
        return Body(await self.head(key), _chunks(raw))

    def _read(self, key: str, start: int, stop: int) -> bytes:
        return bytes(self._files.cat_file(key, start=start, end=stop))

    async def head(self, key: str) -> Pin:
        """See ``Service``."""
        return _pin_of(await asyncio.to_thread(self._files.info, key))

    async def names(self, key: str) -> list[str]:
        """See ``Service``. None where there is no such directory."""
        try:
            listed = await asyncio.to_thread(self._files.ls, key, detail=False)
        except FileNotFoundError:
            return []
        return [str(path).rstrip("/").rpartition("/")[2] for path in listed]

    async def below(self, key: str) -> dict[str, Pin]:
        """See ``Service``."""
        try:
            found = await asyncio.to_thread(self._files.find, key, detail=True)
        except FileNotFoundError:
            return {}
        start = str(self._files._strip_protocol(key)).rstrip("/")
        return {path[len(start) :].lstrip("/"): _pin_of(said) for path, said in found.items()}

    async def tree(self, key: str) -> list[str]:
        """See ``Service``."""
        return list(await self.below(key))

    async def put(self, key: str, content: Path | bytes, mode: object) -> None:
        """See ``Service``."""
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        """See ``Service``."""
        raise NotImplementedError


def _pin_of(said: Any) -> Pin:
    tag = next((str(said[name]) for name in _TAGS if said.get(name)), None)
    return Pin(int(said["size"]), tag, next((said[name] for name in _TIMES if said.get(name)), None))


async def _chunks(raw: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(raw), CHUNK):
        yield raw[start : start + CHUNK]
