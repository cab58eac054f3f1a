"""Saved plans: writing one to a file, all of it or nothing, and reading it without trust in what the file says.

A file is ``MAGIC``, the digest of the rest (xxh3, 8 bytes, little-endian), and one msgpack document. It holds names,
numbers and small constants. Operations are named from a list of those that only compute on their operands. Each is
tried on tensors without data, so what a file says of its results is checked too. A file of other bytes, damaged or
forged, gives ``PlanFileError`` and nothing else.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from ...errors import PlanFileError
from ...gc_pause import without_collection
from .document import VERSION, Document, document_of
from .validation import validated

_MAGIC = b"hotweights plan\n"
_ANEW = "make one with hw.trace(model, manifest).save(path)"


def write(path: str | os.PathLike[str], parts: Mapping[str, Any]) -> None:
    """Write the fields of a plan to ``path``, which is replaced at once, by all of it.

    Raises:
        PlanFileError: it holds something that a file may not.
    """
    with without_collection():
        payload = msgspec.msgpack.encode(document_of(path, parts))
        try:  # What could not be read again is better refused now than when it is needed.
            validated(path, msgspec.msgpack.decode(payload, type=Document))
        except PlanFileError as error:
            raise PlanFileError(f"{path}: this plan can be used but not saved: {error}") from error
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with open(handle, "wb") as file:
            file.write(_MAGIC + xxhash.xxh3_64_intdigest(payload).to_bytes(8, "little") + payload)
        os.replace(name, target)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:  # A full disk names no file.
            error.filename = os.fspath(path)
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of the plan in ``path``, checked: every index, every region, every operation.

    Raises:
        PlanFileError: this is no plan, or one that cannot be believed.
        FileNotFoundError: there is no such file; other errors of the file system are passed on alike.
    """
    data = Path(path).read_bytes()
    head = len(_MAGIC) + 8
    if data[: len(_MAGIC)] != _MAGIC or len(data) < head:
        raise PlanFileError(f"{path}: is no saved plan; {_ANEW}")
    if xxhash.xxh3_64_intdigest(memoryview(data)[head:]).to_bytes(8, "little") != data[head - 8 : head]:
        raise PlanFileError(f"{path}: is damaged: its digest does not match its bytes; {_ANEW}")
    with without_collection():
        try:
            version = msgspec.msgpack.decode(memoryview(data)[head:], type=_Versioned).version
            if version != VERSION:
                raise PlanFileError(f"{path}: is a plan of version {version}; this hotweights reads {VERSION}; {_ANEW}")
            document = msgspec.msgpack.decode(memoryview(data)[head:], type=Document)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise PlanFileError(f"{path}: is no saved plan: {error}") from error
        return validated(path, document)


class _Versioned(msgspec.Struct):
    version: int
