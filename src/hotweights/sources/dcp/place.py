"""Place: whether a path leads to a DCP checkpoint, and to which dict of it. It does not need torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import CheckpointError
from ...text import some

NAME = ".metadata"
"""The file that says what was saved. It is written last, beside the files that hold the bytes."""

OUTERMOST = "."
"""The ``subfolder`` that stands for the tensors that lie in no dict."""

BYTES = ".distcp"
"""How files of tensors end."""

_SAFETENSORS = ".safetensors"


class DcpPlace(NamedTuple):
    """A DCP checkpoint: its directory, and the dict that is asked for.

    ``parts`` are names of safetensors, where each rank wrote some and no ``.metadata`` says what they hold.
    """

    directory: Path
    branch: str | None
    parts: tuple[str, ...] = ()


def dcp_place(what: object, subfolder: str | None) -> DcpPlace | None:
    """Where the DCP checkpoint lies that a caller names; ``None`` if it is none.

    ``subfolder`` is a folder in the directory, or else a dict of the checkpoint.

    Raises:
        CheckpointError: safetensors lie beside it, and nothing says which is meant.
    """
    if isinstance(what, Sequence) and not isinstance(what, (str, bytes)):
        return _listed(what) if subfolder is None else None
    if not isinstance(what, (str, os.PathLike)):
        return None
    path = Path(os.fsdecode(what)).expanduser()
    if path.name == NAME and path.is_file():
        return DcpPlace(path.parent, subfolder)
    if subfolder is not None and subfolder != OUTERMOST and os.path.isdir(path / subfolder):
        return _within(path / subfolder, None)
    return _within(path, subfolder)


def _listed(what: Sequence[object]) -> DcpPlace | None:
    """A list of parts, which may lie on several disks. A single one is a file like others: somebody looks into it."""
    if not all(isinstance(path, (str, os.PathLike)) for path in what):
        return None
    paths = list(dict.fromkeys(os.path.abspath(os.path.expanduser(os.fsdecode(path))) for path in what))  # type: ignore[arg-type]
    if len(paths) < 2 or not all(_PART.fullmatch(os.path.basename(path)) for path in paths):
        return None
    return DcpPlace(Path(os.path.dirname(paths[0])), None, tuple(paths))


def _within(directory: Path, branch: str | None) -> DcpPlace | None:
    try:
        names = sorted(os.listdir(directory))
    except (OSError, ValueError):  # It is no directory, or not ours to list; whoever opens it says so.
        return None
    if not is_dcp(names) or not os.path.isfile(directory / NAME):
        parts = rank_parts(names)
        return DcpPlace(directory, branch, parts) if parts else None
    if others := [name for name in names if name.endswith(_SAFETENSORS) and not name.startswith(".")]:
        raise CheckpointError(
            f"{directory}: holds a DCP checkpoint, and safetensors beside it; open the one you mean",
            [
                f"{NAME}: hotweights.open({str(directory / NAME)!r})",
                f"{some(others, 3)}: hotweights.open({[str(directory / name) for name in others]!r})",
            ],
        )
    return DcpPlace(directory, branch)


def is_dcp(names: Iterable[str]) -> bool:
    """Whether a directory that holds these names is a DCP checkpoint."""
    return NAME in names


_PART = re.compile(r"shard-(\d+)-model-\d+-of-\d+\.safetensors")


def rank_parts(names: Iterable[str]) -> tuple[str, ...]:
    """Which of these safetensors hold each the parts of one rank, under the whole tensors' names; none, or all."""
    weights = [name for name in names if name.endswith(_SAFETENSORS) and not name.startswith(".")]
    return tuple(weights) if all(map(_PART.fullmatch, weights)) else ()


def absent_ranks(names: Iterable[str]) -> str:
    """Which ranks wrote nothing, by the numbers in the names of these parts. The last ones nobody can know of."""
    there = {int(match[1]) for name in names if (match := _PART.fullmatch(os.path.basename(name)))}
    lacking = [f"shard-{number:05}-*" for number in range(1, max(there, default=0)) if number not in there]
    return f"there is no {some(lacking, 5)}; was it copied or saved to its end?" if lacking else ""


def unfinished_dcp(names: Sequence[str]) -> str | None:
    """Why a directory that holds these names, and no ``.metadata``, is no DCP checkpoint though it looks like one."""
    held = [name for name in names if name.endswith(BYTES)]
    if not held:
        return None
    what = f"holds {some(held, 3)} of torch.distributed.checkpoint"
    if any(name.startswith("__") and name.endswith(NAME) for name in names):
        return f"{what}, saved with use_collectives=False: no {NAME} says what all ranks wrote; save it without"
    return f"{what}, but no {NAME}, which is written last; has its save ended?"
