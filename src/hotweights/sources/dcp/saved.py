"""Saved: what the ``.metadata`` of a DCP directory says. No code of its pickle runs.

torch pickles its own dataclasses there, and unpickles whatever the file names. Here each class is a stand-in that holds
the fields, and a class that is not torch's own is refused by name. Source: ``torch/distributed/checkpoint/metadata.py``
and ``filesystem.py``, torch 2.0 to 2.13.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ...errors import CheckpointError
from ..files.index import lies_outside

Keys = tuple[str | int, ...]
"""Where a value lay in the nested state dict that was saved."""

_LARGEST = 2**63 - 1  # elements; torch counts in int64


class Stored(NamedTuple):
    """Where a part of a tensor was written: bytes of a file, which are a ``torch.save`` of it."""

    file: str
    offset: int
    nbytes: int


class SavedPart(NamedTuple):
    """A part of a tensor: its first index and its lengths, in each dimension. ``stored`` is ``None`` if it is empty."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    stored: Stored | None


class SavedTensor(NamedTuple):
    """A tensor: its dtype and shape, and its parts."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[SavedPart, ...]


@dataclass(frozen=True, slots=True)
class Saved:
    """What was saved.

    Attributes:
        tensors: by their names: the keys of nested dicts, joined by dots.
        others: names of what is no tensor: numbers, generators, extra states. It is not read.
        keys: the keys themselves, where the file has them.
    """

    tensors: dict[str, SavedTensor]
    others: tuple[str, ...]
    keys: dict[str, Keys]


class _Standin:
    """Stands for one of torch's dataclasses. Its fields become attributes."""


class _Metadata(_Standin): ...


class _Tensor(_Standin): ...


class _Bytes(_Standin): ...


class _Properties(_Standin):
    """torch gives its state as a tuple, whose first item is the dtype."""

    dtype: object = None

    def __setstate__(self, state: object) -> None:
        self.dtype = state[0] if isinstance(state, tuple) and state else None


def _text(*parts: object) -> str:
    return "/".join(map(str, parts))


def _tuple(items: object = ()) -> tuple[Any, ...]:
    return tuple(items) if isinstance(items, (tuple, list)) else ()


_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN: dict[tuple[str, str], Callable[..., object]] = {
    (_METADATA, "Metadata"): _Metadata,
    (_METADATA, "TensorStorageMetadata"): _Tensor,
    (_METADATA, "BytesStorageMetadata"): _Bytes,
    (_METADATA, "ChunkStorageMetadata"): _Standin,
    (_METADATA, "TensorProperties"): _Properties,
    (_METADATA, "MetadataIndex"): _Standin,
    (_METADATA, "StorageMeta"): _Standin,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _text,
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): _Properties,  # up to torch 2.1
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): _text,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Standin,
    ("torch", "Size"): _tuple,
    ("torch", "device"): _text,
    ("torch.serialization", "_get_layout"): _text,
    ("collections", "OrderedDict"): dict,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (known := _KNOWN.get((module, name))) is not None:
            return known
        if module in ("pathlib", "pathlib._local") and name.endswith("Path"):
            return _text
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        raise _ForeignClass(f"{module}.{name}")


class _ForeignClass(Exception):
    """The pickle names a class that is not torch's own."""


def read_saved(file: str, raw: bytes) -> Saved:
    """Parse and validate the bytes of ``file``.

    Raises:
        CheckpointError: with every problem of every tensor.
    """
    try:
        metadata = _Unpickler(io.BytesIO(raw)).load()
    except _ForeignClass as error:
        raise CheckpointError(
            f"{file}: names {error}, which is not of torch's own metadata; nothing of it was run. If you trust the "
            f"file, let torch read it: torch.distributed.checkpoint.format_utils.dcp_to_torch_save",
            cause="bad_index",
        ) from None
    except Exception as error:  # A damaged pickle raises nearly anything.
        raise CheckpointError(
            f"{file}: is not what torch.distributed.checkpoint writes: {type(error).__name__}: {error}",
            cause="bad_index",
        ) from error
    if not isinstance(metadata, _Metadata):
        raise CheckpointError(
            f"{file}: is not what torch.distributed.checkpoint writes, but a {_kind(metadata)}", cause="bad_index"
        )
    return _validated(file, vars(metadata))


def _validated(file: str, fields: dict[str, Any]) -> Saved:
    entries, storage = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        raise CheckpointError(
            f"{file}: does not say what was saved, and where; another writer than torch's made it", cause="bad_index"
        )
    where = {(getattr(key, "fqn", None), _ints(getattr(key, "offset", None))): info for key, info in storage.items()}
    problems: list[str] = []
    tensors: dict[str, SavedTensor] = {}
    others: list[str] = []
    for name, entry in entries.items():
        if isinstance(entry, _Bytes):
            others.append(str(name))
            continue
        try:
            tensors[name] = _tensor(name, entry, where)
        except _Problem as problem:
            problems += problem.args
    if problems:
        raise CheckpointError(file, problems, cause="bad_index")
    said = fields.get("planner_data")
    keys = {name: path for name, path in said.items() if isinstance(path, tuple)} if isinstance(said, dict) else {}
    return Saved(tensors, tuple(others), keys)


class _Problem(Exception):
    """What is wrong with one tensor, a line for each."""


_Where = dict[tuple[Any, "tuple[int, ...] | None"], Any]


def _tensor(name: object, entry: object, where: _Where) -> SavedTensor:
    if not isinstance(name, str) or not isinstance(entry, _Tensor):
        raise _Problem(f"tensor {name!r}: a name and what torch says of a tensor expected, {_kind(entry)} found")
    fields = vars(entry)
    dtype, shape = getattr(fields.get("properties"), "dtype", None), _ints(fields.get("size"))
    chunks = fields.get("chunks")
    if not isinstance(dtype, torch.dtype) or shape is None or not isinstance(chunks, list):
        raise _Problem(f"tensor {name!r}: dtype, shape and parts expected, {sorted(fields)} found")
    if math.prod(filter(None, shape)) > _LARGEST:
        raise _Problem(f"tensor {name!r}: shape {list(shape)} has more elements than any memory")
    problems: list[str] = []
    parts = [part for chunk in chunks if (part := _part(name, chunk, where, problems)) is not None]
    if problems:
        raise _Problem(*problems)
    return SavedTensor(dtype, shape, tuple(parts))


def _part(name: str, chunk: object, where: _Where, problems: list[str]) -> SavedPart | None:
    offsets, sizes = (_ints(getattr(chunk, field, None)) for field in ("offsets", "sizes"))
    if offsets is None or sizes is None:
        problems.append(f"tensor {name!r}: a part without a place in it")
        return None
    if 0 in sizes:
        return SavedPart(offsets, sizes, None)
    info = where.get((name, offsets), where.get((name, None)))
    fields = vars(info) if isinstance(info, _Standin) else {}
    file, offset, nbytes = (fields.get(key) for key in ("relative_path", "offset", "length"))
    at = f"tensor {name!r}: its part at {list(offsets)}"
    if not isinstance(file, str) or not isinstance(offset, int) or not isinstance(nbytes, int):
        problems.append(f"{at} was not written, or nothing says where")
    elif lies_outside(file):
        problems.append(f"{at} lies outside the directory, in {file!r}")
    elif transforms := fields.get("transform_descriptors"):
        problems.append(f"{at} was written through {', '.join(map(str, transforms))}; only plain bytes are read")
    elif offset < 0 or nbytes < 0:
        problems.append(f"{at} lies at byte {offset} of {file!r} and has {nbytes} bytes")
    else:
        return SavedPart(offsets, sizes, Stored(file, offset, nbytes))
    return None


def _ints(value: object) -> tuple[int, ...] | None:
    """A tuple of lengths; ``None`` if it is none."""
    if isinstance(value, tuple) and all(type(item) is int and item >= 0 for item in value):
        return value
    return None


def _kind(value: object) -> str:
    return type(value).__name__.lstrip("_")
