"""Opened: the files that hold the parts, open; and which of them are missing, or end too early."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from ...errors import CheckpointError
from ..files.file import File
from .place import NAME
from .saved import SavedTensor, Stored


def open_files(
    directory: Path, tensors: Mapping[str, SavedTensor], undo: ExitStack
) -> tuple[dict[str, File], list[str]]:
    """The files that hold these tensors, by their names in the checkpoint; and what is wrong with the others."""
    holding = Counter(file for tensor in tensors.values() for file in {stored.file for stored in stored_of(tensor)})
    there, problems = [], []
    for name in sorted(holding):
        if os.path.exists(directory / name):
            there.append(name)
            continue
        problems.append(f"{directory / name}: {NAME} names it for {holding[name]} tensors, but there is no such file")
    files, broken = open_parts(directory, there, undo)
    return files, problems + broken


def open_parts(directory: Path, names: Iterable[str], undo: ExitStack) -> tuple[dict[str, File], list[str]]:
    """The files of these names; and why others cannot be opened."""
    files: dict[str, File] = {}
    problems = []
    for name in names:
        try:
            files[name] = File(str(directory / name))
            undo.callback(files[name].close)
        except CheckpointError as error:
            problems.append(error.title)
    return files, problems


def stored_of(tensor: SavedTensor) -> Iterator[Stored]:
    """Where the parts of the tensor lie that are not empty."""
    return (part.stored for part in tensor.parts if part.stored is not None)


def cut_off(files: Mapping[str, File], tensors: Mapping[str, SavedTensor]) -> list[str]:
    """A line for each file that ends before some of its tensors do: to name each would bury the reason."""
    cut: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name, tensor in tensors.items():
        for stored in stored_of(tensor):
            file = files.get(stored.file)
            if file is not None and stored.offset + stored.nbytes > file.size:
                cut[stored.file].append((stored.offset + stored.nbytes, name))
    problems = []
    for name, ends in cut.items():
        stop, tensor_name = min(ends)
        others = f"this part and {len(ends) - 1} later ones are cut off" if len(ends) > 1 else "is it truncated?"
        problems.append(
            f"{files[name].path}: a part of tensor {tensor_name!r} ends at byte {stop}; the file holds "
            f"{files[name].size}; {others}"
        )
    return problems
