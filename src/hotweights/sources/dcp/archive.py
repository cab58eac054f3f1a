"""Archive: where the bytes of one tensor lie in a ``torch.save`` of it. It reads the ends of the archive, no weight.

The archive is a zip file without compression: a pickle that says dtype, shape and strides, and a file with the bytes.
Nothing of the pickle is run. Sources: ``torch/serialization.py``; PKWARE's APPNOTE 6.3.10, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..files.file import File
from .saved import Stored

_END = 1024  # bytes that are read at either end; the records of a tensor take some 600
_SAFETENSORS = b'{"'


class Plain(NamedTuple):
    """A saved tensor as it lies in a file: its first byte there, and its strides in elements."""

    offset: int
    strides: tuple[int, ...]


class Unreadable(Exception):
    """Why the bytes of a saved tensor cannot be read in place."""


class _Pickled(NamedTuple):
    """What the pickle says: the record that holds the bytes, the first of them, and how they are a tensor."""

    dtype: torch.dtype
    record: str
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Record(NamedTuple):
    """A file of the archive: its first byte counted from the archive's, and its size."""

    header: int
    nbytes: int
    compressed: bool


def find_plain(file: File, stored: Stored, dtype: torch.dtype, shape: tuple[int, ...]) -> Plain:
    """Where the tensor's bytes lie. It must be of this dtype and shape.

    Raises:
        Unreadable: they are not there as they are; the caller names file and tensor.
    """
    part = _Part(file, stored)
    records = part.records()
    pickled = _pickled(part.content(_only(records, "data.pkl")))
    if (pickled.dtype, pickled.shape) != (dtype, shape):
        raise Unreadable(f"{dtype} {list(shape)} expected, {pickled.dtype} {list(pickled.shape)} found")
    order = records.get("byteorder")
    if order is not None and part.content(order) != b"little":
        raise Unreadable("was saved on a machine of another byte order")
    record = _only(records, f"data/{pickled.record}")
    reach = sum((length - 1) * stride for length, stride in zip(shape, pickled.strides, strict=True)) + 1
    if (pickled.first + reach) * dtype.itemsize > record.nbytes:
        raise Unreadable(f"{(pickled.first + reach) * dtype.itemsize} bytes expected, {record.nbytes} found")
    return Plain(stored.offset + part.start(record) + pickled.first * dtype.itemsize, pickled.strides)


def _only(records: dict[str, _Record], name: str) -> _Record:
    record = records.get(name)
    if record is None:
        raise Unreadable(f"is no torch.save of a tensor: it holds {', '.join(sorted(records)) or 'nothing'}")
    if record.compressed:
        raise Unreadable("is compressed")
    return record


class _Part:
    """The bytes of one archive within a file. Both of its ends are read once."""

    def __init__(self, file: File, stored: Stored) -> None:
        self._file, self._stored = file, stored
        self._head = file.pread(min(_END, stored.nbytes), stored.offset)
        self._tail_start = max(0, stored.nbytes - _END)
        self._tail = file.pread(stored.nbytes - self._tail_start, stored.offset + self._tail_start)

    def records(self) -> dict[str, _Record]:
        """The files of the archive, without the folder that all of them lie in."""
        at = self._tail.rfind(b"PK\x05\x06")
        if not self._head.startswith(b"PK\x03\x04") or at < 0:
            is_safetensors = self._head[8:10] == _SAFETENSORS
            raise Unreadable(f"is no torch.save of a tensor{', but safetensors' if is_safetensors else ''}")
        nbytes, start = self._unpack("<II", self._tail_start + at + 12)
        if 0xFFFFFFFF in (nbytes, start):  # Then the sizes stand in a record of their own.
            (far,) = self._unpack("<Q", self._tail_start + at - 20 + 8)
            nbytes, start = self._unpack("<QQ", far + 40)
        return dict(_listed(self._bytes(nbytes, start)))

    def start(self, record: _Record) -> int:
        """The first byte of its content. The local header's extra field, which aligns it, is in no other place."""
        name, extra = self._unpack("<HH", record.header + 26)
        start: int = record.header + 30 + name + extra
        if start + record.nbytes > self._stored.nbytes:
            raise Unreadable(f"{start + record.nbytes} bytes expected, {self._stored.nbytes} found")
        return start

    def content(self, record: _Record) -> bytes:
        """What a small file of the archive holds."""
        return self._bytes(record.nbytes, self.start(record))

    def _unpack(self, form: str, start: int) -> tuple[Any, ...]:
        return struct.unpack(form, self._bytes(struct.calcsize(form), start))

    def _bytes(self, nbytes: int, start: int) -> bytes:
        stop = start + nbytes
        if start < 0 or stop > self._stored.nbytes:
            raise Unreadable("its records lead out of it")
        if stop <= len(self._head):
            return self._head[start:stop]
        if start >= self._tail_start:
            return self._tail[start - self._tail_start : stop - self._tail_start]
        return self._file.pread(nbytes, self._stored.offset + start)


_ENTRY = struct.Struct("<4s6xH8xIIHHH8xI")  # of the central directory
_TAIL = 46


def _listed(raw: bytes) -> dict[str, _Record]:
    records: dict[str, _Record] = {}
    at = 0
    while at + _TAIL <= len(raw):
        magic, method, packed, nbytes, name_nbytes, extra_nbytes, comment_nbytes, header = _ENTRY.unpack_from(raw, at)
        if magic != b"PK\x01\x02":
            break
        name = raw[at + _TAIL : at + _TAIL + name_nbytes].decode(errors="replace")
        extra = raw[at + _TAIL + name_nbytes : at + _TAIL + name_nbytes + extra_nbytes]
        if 0xFFFFFFFF in (nbytes, packed, header):
            nbytes, packed, header = _large(extra, nbytes, packed, header)
        records[name.partition("/")[2]] = _Record(header, nbytes, method != 0 or packed != nbytes)
        at += _TAIL + name_nbytes + extra_nbytes + comment_nbytes
    return records


def _large(extra: bytes, *sizes: int) -> tuple[int, ...]:
    """The sizes that do not fit into 32 bits stand in the extra field of id 1, one behind the other."""
    at = 0
    while at + 4 <= len(extra):
        kind, nbytes = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            left = [value for (value,) in struct.iter_unpack("<Q", extra[at + 4 : at + 4 + nbytes // 8 * 8])]
            return tuple(left.pop(0) if size == 0xFFFFFFFF and left else size for size in sizes)
        at += 4 + nbytes
    return sizes


# The pickle.


class _Storage(NamedTuple):
    dtype: torch.dtype | None  # None: bytes, whose dtype the tensor says
    key: str


def _tensor_v2(storage: _Storage, first: object, shape: object, strides: object, *rest: object) -> _Pickled:
    return _made(storage, storage.dtype, first, shape, strides, rest[2:])


def _tensor_v3(storage: _Storage, first: object, shape: object, strides: object, *rest: object) -> _Pickled:
    return _made(storage, rest[2], first, shape, strides, rest[3:])


def _made(
    storage: _Storage, dtype: object, first: object, shape: object, strides: object, rest: tuple[object, ...]
) -> _Pickled:
    if any(rest):
        raise Unreadable(f"is a tensor with {rest[0]}, whose bytes are not its values")
    if not isinstance(dtype, torch.dtype) or not isinstance(first, int) or first < 0:
        raise ValueError("no dtype, or no first element")
    lengths = _lengths(shape), _lengths(strides)
    if len(lengths[0]) != len(lengths[1]):
        raise ValueError("a stride for each dimension expected")
    return _Pickled(dtype, storage.key, first, *lengths)


def _lengths(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(item) is int and item >= 0 for item in value):
        raise ValueError("lengths expected")
    return value


_REBUILT: dict[tuple[str, str], Callable[..., object]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("collections", "OrderedDict"): dict,
}


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (known := _REBUILT.get((module, name))) is not None:
            return known
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return None
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise Unreadable(f"is no plain tensor, but made by {module}.{name}")

    def persistent_load(self, what: Any) -> _Storage:
        _, dtype, key, _, _ = what
        return _Storage(dtype, str(key))


@lru_cache(maxsize=4096)  # Layer by layer, the same few pickles come again.
def _pickled(raw: bytes) -> _Pickled:
    try:
        tensor = _TensorUnpickler(io.BytesIO(raw)).load()
    except Unreadable:
        raise
    except Exception as error:  # A damaged pickle raises nearly anything.
        raise Unreadable(f"is no torch.save of a tensor: {type(error).__name__}: {error}") from error
    if not isinstance(tensor, _Pickled):
        raise Unreadable(f"is no tensor, but a {type(tensor).__name__}")
    return tensor
