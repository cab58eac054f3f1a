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
    """A DCP checkpoint: its directory, and the dict that is asked for."""

    directory: Path
    branch: str | None


def dcp_place(what: object, subfolder: str | None) -> DcpPlace | None:
    """Where the DCP checkpoint lies that a caller names; ``None`` if it is none.

    ``subfolder`` is a folder in the directory, or else a dict of the checkpoint.

    Raises:
        CheckpointError: safetensors lie beside it, and nothing says which is meant.
    """
    if not isinstance(what, (str, os.PathLike)):
        return None
    path = Path(os.fsdecode(what)).expanduser()
    if path.name == NAME and path.is_file():
        return DcpPlace(path.parent, subfolder)
    if subfolder is None:
        return DcpPlace(path, None) if _is_meant(path) else None
    if subfolder != OUTERMOST and os.path.isdir(path / subfolder):
        return DcpPlace(path / subfolder, None) if _is_meant(path / subfolder) else None
    return DcpPlace(path, subfolder) if _is_meant(path) else None


def _is_meant(directory: Path) -> bool:
    if not os.path.isfile(directory / NAME):  # Unlike Path.is_file, false for names that are too long.
        return False
    names = os.listdir(directory)
    if others := sorted(name for name in names if name.endswith(_SAFETENSORS) and not name.startswith(".")):
        raise CheckpointError(
            f"{directory}: holds a DCP checkpoint, and safetensors beside it; open the one you mean",
            [
                f"{NAME}: hotweights.open({str(directory / NAME)!r})",
                f"{some(others, 3)}: hotweights.open({[str(directory / name) for name in others]!r})",
            ],
        )
    return True


def is_dcp(names: Iterable[str]) -> bool:
    """Whether a directory that holds these names is a DCP checkpoint."""
    return NAME in names


_PART = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")


def parts_of_dcp(names: Iterable[str]) -> str | None:
    """Why the safetensors of these names are no checkpoint, if each holds one rank's parts under the tensors' names."""
    parts = [name for name in names if _PART.fullmatch(name)]
    if not parts or any(name.endswith(_SAFETENSORS) and name not in parts for name in names):
        return None
    return (
        f"holds {some(parts, 3)}, parts of tensors that HuggingFaceStorageWriter(save_distributed=True) wrote; save "
        "with enable_consolidation=True too, or with FileSystemWriter"
    )


def unfinished_dcp(names: Sequence[str]) -> str | None:
    """Why a directory that holds these names, and no ``.metadata``, is no DCP checkpoint though it looks like one."""
    held = [name for name in names if name.endswith(BYTES)]
    if not held:
        return None
    what = f"holds {some(held, 3)} of torch.distributed.checkpoint"
    if any(name.startswith("__") and name.endswith(NAME) for name in names):
        return f"{what}, saved with use_collectives=False: no {NAME} says what all ranks wrote; save it without"
    return f"{what}, but no {NAME}, which is written last; has its save ended?"
