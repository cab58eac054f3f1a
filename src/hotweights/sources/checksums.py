"""Checksums: a file that says what a checkpoint must hold, and whether it does.

Two formats: lines of ``sha256sum``, and the JSON that ``hotweights verify --write`` makes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from ..errors import CheckpointChanged, CheckpointError
from ..memory.digest import Digest
from .dcp.source import DcpSource
from .files.source import FileSource

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_PIECE = 1024 * 1024


def check_digests(source: FileSource | DcpSource, checksums: str | os.PathLike[str]) -> None:
    """Read every byte of the source, and compare. The source looks at its files again when it is read later.

    Raises:
        CheckpointError: with every file or tensor that differs, or is not in the list.
    """
    path = Path(checksums)
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from error
    problems = _tensors(source, path, text) if text.lstrip().startswith("{") else _files(source, path, text)
    if problems:
        raise CheckpointError(f"{source.path}: is not what {path} says", problems)


def _tensors(source: FileSource | DcpSource, path: Path, text: str) -> list[str]:
    try:
        expected = json.loads(text)["tensors"]
        said = {str(name): str(digest) for name, digest in expected.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f'{path}: no digests: JSON with "tensors" was expected, by hotweights verify --write'
        ) from error
    found = source.digest().tensors
    problems = [f"tensor {name!r}: expected, and not there" for name in said.keys() - found.keys()]
    problems += [f"tensor {name!r}: not in the list" for name in found.keys() - said.keys()]
    return problems + [
        f"tensor {name!r}: digest {said[name]} expected, found {found[name]}"
        for name in said.keys() & found.keys()
        if said[name] != found[name]
    ]


def _files(source: FileSource | DcpSource, path: Path, text: str) -> list[str]:
    lines = [_LINE.fullmatch(line.strip()) for line in text.splitlines() if line.strip()]
    said = {os.path.basename(match[2]): match[1].lower() for match in lines if match is not None}
    if None in lines or not said:
        raise CheckpointError(
            f"{path}: no digests: lines of sha256sum were expected, or JSON by hotweights verify --write"
        )
    problems: list[str] = []
    for file in source.files:
        name = os.path.basename(file)
        if name not in said:
            problems.append(f"{name}: not in the list")
        elif (found := _sha256(file)) != said[name]:
            problems.append(f"{name}: sha256 {said[name]} expected, found {found}")
    source.check()  # What was read by its path is what is open.
    return problems


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError as error:
        raise CheckpointChanged(f"{path}: cannot be read any more: {error.strerror}") from error
    return digest.hexdigest()


def write_digests(digest: Digest, path: str | os.PathLike[str]) -> None:
    """Write a file that ``check_digests`` reads."""
    try:
        Path(path).write_text(json.dumps(digest.as_dict(), indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(f"{os.fspath(path)}: cannot be written: {error.strerror}") from error
