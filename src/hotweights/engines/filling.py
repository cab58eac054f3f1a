"""Filling: what the ``from_pretrained`` of several packages have in common. It imports none of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import nn

from ..errors import CheckpointError, UsageError
from ..loading.load import load
from ..model.materialise import dressed, materialise
from ..model.places import Place, places
from ..plan.plan import LoadPlan
from ..rename import Rename
from ..sources.contracts import IOMode
from ..sources.files.source import FileSource


class How(NamedTuple):
    """How the weights of a model are read."""

    io: IOMode
    threads: int | None
    show_progress: bool | None


HOW: ContextVar[How | None] = ContextVar("how hotweights reads", default=None)
"""``None`` where the package reads its models itself: in other threads, and outside ``reading()``."""


@contextmanager
def read_as(how: How) -> Iterator[None]:
    """Inside, in this thread or task, models are read so."""
    before = HOW.set(how)
    try:
        yield
    finally:
        HOW.reset(before)


@contextmanager
def our_errors(package: str, where: str, *, local_files_only: bool) -> Iterator[None]:
    """Turn what a package says of a checkpoint into a ``CheckpointError``; also that it needs one that is not there."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, UsageError):
            raise
        absent = local_files_only and not os.path.exists(where)
        cure = f"; if it is a name on the hub: `hf download {where}`" if absent else ""
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"{where}: {package} makes no model of it: {first}{cure}") from error


def to_meta(place: Place) -> None:
    """Put a tensor without bytes there. What a class made real would stay on its device, and in its dtype."""
    if not place.tensor.is_meta:
        place.put(dressed(torch.empty_like(place.tensor, device="meta"), place.tensor))


def fill(
    model: nn.Module,
    source: FileSource,
    plan: LoadPlan,
    how: How,
    device_of: Callable[[str], torch.device],
    rename: Rename | None = None,
) -> None:
    """Make what the plan writes real, each tensor on its device, and read it. All else stays as it is, on meta too."""
    devices: dict[torch.device, set[str]] = {}
    for name in {name for step in plan.steps for name in step.destinations}:
        devices.setdefault(device_of(name), set()).add(name)
    for device, names in devices.items():
        materialise(places(model), names, device)
    load(
        model,
        source,
        plan=plan,
        rename=rename,
        io=how.io,
        threads=how.threads,
        show_progress=how.show_progress,
    )
