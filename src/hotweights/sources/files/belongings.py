"""Belongings: what of a model's directory goes along when its weights are copied. docs/ci.md tells the rule."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import CheckpointError

# Weights, and what trainers put beside them, by their names: the copy has its own, and other formats are other weights.
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|onnx|onnx_data|h5|keras|msgpack|npz|npy|pkl|pdparams|distcp|tflite|pb|"
    r"ot|engine|mlmodel|nemo|index\.json|incomplete|part|crdownload)|.*\.onnx[._]data.*",
    re.IGNORECASE,
)
MODULES = "modules.json"
"""Of sentence-transformers: each module has a folder, and a dense one has weights in it."""


@dataclass(frozen=True, slots=True)
class Belongings:
    """What lies in a model's directory besides the weights that are read.

    Attributes:
        files: what goes along, by its name in the directory: ``config.json``, ``1_Pooling/config.json``.
        left: what does not, and why; folders end in a slash.
    """

    files: dict[str, Path] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def belongings(directory: Path, weights: tuple[str, ...] = ()) -> Belongings:
    """What goes along with ``weights``, files in the directory that are read and are not told of.

    * Every file that holds no weights.
    * Every folder in which no weights lie; and those that ``modules.json`` names, with their weights, as they are.
    * A link goes along as the file that it leads to, if that lies in the directory, or in the blobs of its hub cache.

    Nothing whose name begins with a dot goes along.
    """
    found = Belongings()
    inside = _inside(directory)
    named = _modules(directory)
    read = {os.path.basename(path) for path in weights}
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        for entry in entries:
            if entry.name.startswith(".") or entry.name in read:
                continue
            if os.path.isdir(entry.path):  # DirEntry.is_dir fails for a link that leads to itself.
                _folder(Path(entry.path), inside, found, whole=entry.name in named)
            elif _WEIGHTS.fullmatch(entry.name):
                if not entry.name.endswith(".index.json"):
                    found.left[entry.name] = "weights of another format, or of a trainer"
            elif (why := _unfit(Path(entry.path), inside)) is not None:
                found.left[entry.name] = why
            else:
                found.files[entry.name] = Path(entry.path)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or directory}: cannot be listed: {error.strerror}", cause="cannot_open"
        ) from error
    return found


def belong(names: Iterable[str], weights: Collection[str], modules: bytes) -> tuple[list[str], dict[str, str]]:
    """The same of a place that has no links: which of its files go along, and what does not, and why.

    Args:
        names: all files there, those in folders by ``folder/name``.
        weights: those that are read.
        modules: what ``modules.json`` holds, or nothing.
    """
    along: list[str] = []
    left: dict[str, str] = {}
    named = _modules_in(modules)
    seen = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    holding: dict[str, str] = {}  # folders, and the weights that they hold
    for name in sorted(seen):
        folder, slash, rest = name.partition("/")
        if slash and folder not in named and _WEIGHTS.fullmatch(os.path.basename(name)):
            holding.setdefault(folder, rest)
    for name in sorted(seen):
        folder, slash, _ = name.partition("/")
        if slash and folder in holding:
            left[f"{folder}/"] = f"holds weights: {holding[folder]}"
        elif slash or not _WEIGHTS.fullmatch(name):
            along.append(name)
        elif name not in weights and not name.endswith(".index.json"):
            left[name] = "weights of another format, or of a trainer"
    return along, left


def _folder(folder: Path, inside: tuple[str, ...], found: Belongings, *, whole: bool) -> None:
    files = {}
    if folder.is_symlink():
        found.left[f"{folder.name}/"] = "a link to a folder"
        return
    for path in _walk(folder):
        name = f"{folder.name}/{path.relative_to(folder)}"
        if _WEIGHTS.fullmatch(path.name) and not whole:
            found.left[f"{folder.name}/"] = f"holds weights: {path.relative_to(folder)}"
            return
        if (why := _unfit(path, inside)) is not None:
            found.left[name] = why
        else:
            files[name] = path
    found.files.update(files)


def _walk(folder: Path) -> Iterator[Path]:
    """All in the folder that is none; hidden ones, and links to folders, are not gone into."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        else:
            yield Path(entry.path)


def _unfit(path: Path, inside: tuple[str, ...]) -> str | None:
    """Why the file does not go along."""
    if os.path.isdir(path):
        return "a link to a folder"
    if path.is_symlink():
        real = os.path.realpath(path)
        if not os.path.exists(real):
            return "a link that leads nowhere"
        if not real.startswith(inside):
            return "a link that leads out of the directory"
    return None if path.is_file() else "a pipe, a socket or a device"


def _inside(directory: Path) -> tuple[str, ...]:
    """Where links may lead: into the directory; from a snapshot of a hub cache, into the blobs of its repository."""
    real = os.path.realpath(directory)
    repository, snapshots = os.path.split(os.path.dirname(real))
    places = [real]
    if snapshots == "snapshots" and os.path.basename(repository).startswith("models--"):
        places.append(os.path.join(repository, "blobs"))
    return tuple(os.path.join(place, "") for place in places)


def _modules(directory: Path) -> set[str]:
    """The folders that a ``modules.json`` names."""
    try:
        return _modules_in((directory / MODULES).read_bytes())
    except OSError:
        return set()


def _modules_in(content: bytes) -> set[str]:
    try:
        return {module["path"] for module in json.loads(content) if isinstance(module["path"], str)}
    except (ValueError, TypeError, KeyError, RecursionError):
        return set()
