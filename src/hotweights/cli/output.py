"""Outputs: files and places that a command writes, which must not be what it reads, or what somebody else wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from ..errors import UsageError

_WRITTEN = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json", ".zip", ".npz")


def may_write(option: str, path: Path | None, ours: Callable[[bytes], bool]) -> None:
    """See that nothing lies at ``path``, or what this option has written before.

    Raises:
        UsageError: it would replace a file of somebody else's, such as a shard.
    """
    if path is None or not path.is_file():
        return
    with suppress(OSError):  # Whoever writes it says why it cannot.
        content = path.read_bytes() if path.stat().st_size < 1 << 30 else b"?"
        if content and not ours(content):
            raise UsageError(f"{option} {path}: would replace a file that {option} has not written; name another")


def is_digests(content: bytes) -> bool:
    """Whether ``verify --write`` has written this."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() == {"whole", "tensors"}


def is_timeline(content: bytes) -> bool:
    """Whether ``--trace`` has written this."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "traceEvents" in found


def is_plan(content: bytes) -> bool:
    """Whether ``plan --save`` has written this."""
    return content.startswith(b"hotweights plan\n")


def check_target(to: str, files: Iterable[str]) -> None:
    """See that the target of a copy is not what is read, and that its name is not of another format.

    Raises:
        UsageError: it would replace a file that is read, or ``to`` names another format.
    """
    target = os.path.realpath(to)
    for file in files:
        if target in (os.path.realpath(file), os.path.realpath(os.path.dirname(file) or ".")):
            raise UsageError(f"{to}: is, or holds, what is read ({file}); name another place")
    if to.endswith(_WRITTEN) and not os.path.isdir(to):
        raise UsageError(f"{to}: what is written is safetensors; name a directory, or a file that ends in .safetensors")
