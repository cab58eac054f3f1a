"""Writer: one safetensors file that is being written, a tensor at a time, in any order."""

from __future__ import annotations

import ctypes
import errno
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...dtypes import FORMAT_DTYPES, format_name
from ...errors import SaveError
from ...manifest import TensorSpec
from .header import MAX_HEADER_NBYTES


def unwritable(spec: TensorSpec) -> str | None:
    """Why the format cannot hold this tensor; ``None`` if it can."""
    if spec.name == "__metadata__":
        return "'__metadata__' is no name for a tensor: the format keeps its free text there"
    if not spec.name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in spec.name):
        return f"tensor {spec.name!r}: its name is no text that UTF-8 can hold"
    if format_name(spec.dtype) not in FORMAT_DTYPES:
        return f"tensor {spec.name!r}: safetensors has no dtype {format_name(spec.dtype)}"
    return None


class Writer:
    """A file of known tensors whose bytes come one tensor at a time.

    The file is opened for each tensor: two hundred shards must not need two hundred descriptors.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> None:
        """Write the header of a new file, which must not exist."""
        # Large elements first: behind an odd number of bytes, readers would have to copy them to an aligned address.
        ordered = sorted(specs, key=lambda spec: -FORMAT_DTYPES[format_name(spec.dtype)][0])
        header, offsets = _header(path.name, ordered, metadata)
        self.path = path
        self._ends = {name: 8 + len(header) + offset for name, offset in offsets.items()}
        self._left = set(offsets)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _write(fd, len(header).to_bytes(8, "little") + header, 0)
        finally:
            os.close(fd)

    def put(self, name: str, raw: bytes | ctypes.Array[ctypes.c_char]) -> None:
        """Write the bytes of one tensor."""
        fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            _write(fd, raw, self._ends[name])
        finally:
            os.close(fd)
        self._left.discard(name)

    def finish(self) -> None:
        """Return when the file is on the disk. Raises ``SaveError`` if a tensor never came."""
        if self._left:
            raise SaveError(f"{self.path.name}: the source did not bring", sorted(self._left))
        sync(self.path)


def _header(file: str, specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header's text, padded to 8 bytes, and where in the data each tensor begins."""
    content: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets: dict[str, int] = {}
    stop = 0
    for spec in specs:
        offsets[spec.name] = stop
        content[spec.name] = {
            "dtype": format_name(spec.dtype),
            "shape": _format_shape(spec),
            "data_offsets": [stop, stop + spec.nbytes],
        }
        stop += spec.nbytes
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_NBYTES:
        raise SaveError(
            f"{file}: its header would take {len(text)} bytes, of which {MAX_HEADER_NBYTES} are allowed; a smaller "
            "shard_size= makes more files"
        )
    return text, offsets


def _format_shape(spec: TensorSpec) -> list[int]:
    """torch counts packed elements in packs, the format counts them one by one."""
    bits = FORMAT_DTYPES[format_name(spec.dtype)][0]
    shape = list(spec.shape)
    itemsize = getattr(spec.dtype, "itemsize", None)  # An OpaqueDtype has none, and its shape is the format's.
    if itemsize is not None and shape and bits < 8:
        shape[-1] *= 8 * itemsize // bits
    return shape


def _write(fd: int, raw: bytes | ctypes.Array[ctypes.c_char], offset: int) -> None:
    left = memoryview(raw).cast("B")
    while left:  # One call writes 2 GiB at most.
        done = os.pwrite(fd, left, offset)
        left, offset = left[done:], offset + done


def write_text(path: Path, text: str) -> None:
    """Write a new file and return when it is on the disk."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _write(fd, text.encode(), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def sync(path: Path) -> None:
    """Return when the file, or the names in the directory, are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Some file systems cannot do it for directories.
            raise
    finally:
        os.close(fd)
