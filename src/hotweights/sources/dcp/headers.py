"""Headers: what the safetensors that each rank of a trainer wrote for itself say: which box of which tensor each holds.

``HuggingFaceStorageWriter(save_distributed=True)`` writes them. No file says the shape of a whole tensor: it reaches as
far as its parts do, which is torch's own rule too. Source: ``torch/distributed/checkpoint/hf_storage.py``, torch 2.13.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
import torch

from ...boxes import row_major
from ...errors import CheckpointError
from ..files.file import File
from ..files.header import Entry, read_header
from .archive import Plain
from .saved import Saved, SavedPart, SavedTensor, Stored

_SAID = "DCP_SHARDING_INFO"  # in the free text of a header: JSON, the first index of each tensor's part


class _Info(msgspec.Struct):
    saved_offsets: tuple[int, ...]


_infos = msgspec.json.Decoder(dict[str, _Info])


class Headers(NamedTuple):
    """What the files hold.

    Attributes:
        saved: the tensors, and which parts they lie in.
        plain: how each part lies in its file.
        texts: the free text of each header, by the file's path.
        problems: what is wrong with files, or with parts; the tensors of these are not ``saved``.
    """

    saved: Saved
    plain: dict[Stored, Plain]
    texts: dict[str, dict[str, str]]
    problems: list[str]


class _Found(NamedTuple):
    """A part, and where it was found."""

    path: str
    dtype: torch.dtype
    part: SavedPart


def read_headers(files: Mapping[str, File]) -> Headers:
    """What these files, by their names in the checkpoint, hold together."""
    parts: dict[str, list[_Found]] = defaultdict(list)
    plain: dict[Stored, Plain] = {}
    texts, problems = {}, []
    for name, file in files.items():
        try:
            header = read_header(file.path, file.size, file.pread)
            offsets = _offsets(file.path, header.metadata)
        except CheckpointError as error:
            problems += [f"{error.title}: {problem}" for problem in error.problems] or [error.title]
            continue
        texts[file.path] = dict(header.metadata)
        for entry in header.entries:
            if isinstance(problem := _part(name, entry, offsets), str):
                problems.append(f"{file.path}: tensor {entry.spec.name!r}: {problem}")
                continue
            parts[entry.spec.name].append(_Found(file.path, *problem))
            if (stored := problem[1].stored) is not None:
                plain[stored] = Plain(entry.offset, row_major(entry.spec.shape))
    tensors = {}
    for name, found in parts.items():
        if differences := _differences(name, found):
            problems += differences
            continue
        boxes = tuple(each.part for each in found)
        reach = (zip(part.offsets, part.shape, strict=True) for part in boxes)
        shape = tuple(max(at + length for at, length in spans) for spans in zip(*reach, strict=True))
        tensors[name] = SavedTensor(found[0].dtype, shape, boxes)
    return Headers(Saved(tensors, (), {}), plain, texts, problems)


def _offsets(path: str, texts: Mapping[str, str]) -> dict[str, _Info]:
    if _SAID not in texts:
        raise CheckpointError(f"{path}: has no {_SAID} in its header, which says which box of each tensor it holds")
    try:
        return _infos.decode(texts[_SAID])
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{path}: {_SAID} does not say where its parts begin: {error}") from error


def _part(name: str, entry: Entry, offsets: Mapping[str, _Info]) -> tuple[torch.dtype, SavedPart] | str:
    """The dtype and the box of an entry; or what is wrong with it."""
    spec, info = entry.spec, offsets.get(entry.spec.name)
    if info is None:
        return f"{_SAID} does not say where this part begins"
    if len(info.saved_offsets) != len(spec.shape) or min(info.saved_offsets, default=0) < 0:
        return f"its part {list(spec.shape)} cannot begin at {list(info.saved_offsets)}"
    if not isinstance(spec.dtype, torch.dtype):
        return f"torch has no dtype for {spec.dtype}"
    stored = Stored(name, entry.offset, spec.nbytes) if spec.nbytes else None
    return spec.dtype, SavedPart(info.saved_offsets, spec.shape, stored)


def _differences(name: str, found: list[_Found]) -> list[str]:
    """Why these are not parts of one tensor."""
    first = found[0]
    return [
        f"tensor {name!r}: is {first.dtype} of {len(first.part.shape)} dimensions in {first.path}, and {each.dtype} of "
        f"{len(each.part.shape)} in {each.path}"
        for each in found[1:]
        if (each.dtype, len(each.part.shape)) != (first.dtype, len(first.part.shape))
    ]
