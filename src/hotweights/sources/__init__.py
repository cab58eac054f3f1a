"""Sources: where weights come from. ``open`` chooses one; each kind has a file of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import overload

import torch

from ..errors import UsageError
from .contracts import Addressed, Read, Reading, Source
from .files import FileSource
from .state import StateSource
from .streams import LeaseStream

__all__ = ["Addressed", "FileSource", "LeaseStream", "Read", "Reading", "Source", "StateSource", "open"]


@overload
def open(what: str | os.PathLike[str]) -> FileSource: ...
@overload
def open(what: Mapping[str, torch.Tensor] | torch.nn.Module) -> StateSource: ...
@overload
def open(
    what: str | os.PathLike[str] | Mapping[str, torch.Tensor] | torch.nn.Module,
) -> FileSource | StateSource: ...
def open(what: str | os.PathLike[str] | Mapping[str, torch.Tensor] | torch.nn.Module) -> FileSource | StateSource:
    """Open a source of weights. The caller closes it; use it in a ``with``.

    Args:
        what: a safetensors file; a directory with ``model.safetensors.index.json``, or with files and no index; an
            index file; a snapshot in a hub cache, or its ``models--org--name`` directory; a mapping from names to
            tensors; or an ``nn.Module``, whose ``state_dict()`` is taken.

    Raises:
        CheckpointError: the checkpoint is broken; every problem is listed.
        UsageError: ``what`` is none of these.
    """
    if isinstance(what, (str, os.PathLike)):
        return FileSource(what)
    if isinstance(what, (Mapping, torch.nn.Module)):
        return StateSource(what)
    raise UsageError(f"a source is a path, a mapping of tensors or a module; this is a {type(what).__name__}")
