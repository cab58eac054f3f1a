"""Filling: what the ``from_pretrained`` of several packages have in common. It imports none of them."""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import CheckpointError, PlanError, UsageError
from ..loading.load import load
from ..model.materialise import dressed, materialise
from ..model.places import Place, places
from ..plan.plan import LoadPlan
from ..rename import Rename
from ..sources.contracts import IOMode
from ..sources.files.source import FileSource
from ..tracing.replaced import Replaced
from ..tracing.trace import trace


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
        if "trust_remote_code" in str(error):
            first = f"{first.partition(' You can inspect')[0]} trust_remote_code=True lets it run"
        raise CheckpointError(f"{where}: {package} makes no model of it: {first}{cure}") from error


class Loader:
    """The class method or static method ``_load_pretrained_model`` of a package's models, and ours in its place."""

    def __init__(self, package: str, model_class: Callable[[], Any], ours: Any) -> None:
        """Import nothing.

        Args:
            package: its name.
            model_class: imports the package, and gives the class that has the method.
            ours: the method that stands in its place, as a class holds it. Its arguments are called as the package
                calls them; ``**options`` stand for those that follow.
        """
        self._package = package
        self._model_class = model_class
        self._ours = ours
        self._first = threading.Lock()
        self._replaced: Replaced | None = None

    @property
    def replaced(self) -> Replaced:
        """Whose ``meanwhile`` puts ours there, and whose ``original`` is the package's own.

        Raises:
            UsageError: the package's method takes other arguments than ours.
        """
        with self._first:  # Two of them would each take the other's function for the package's own.
            if self._replaced is None:
                model_class = self._model_class()
                there = inspect.getattr_static(model_class, "_load_pretrained_model").__func__
                if not _same_arguments(there, self._ours.__func__):
                    release = f"{self._package} {sys.modules[self._package].__version__}"
                    raise UsageError(
                        f"{release} fills its models in a way that hotweights does not know "
                        f"({inspect.signature(there)}); use the from_pretrained of {self._package}"
                    )
                self._replaced = Replaced(model_class, "_load_pretrained_model", self._ours)
            return self._replaced


def _same_arguments(theirs: Callable[..., Any], ours: Callable[..., Any]) -> bool:
    names = [*inspect.signature(theirs).parameters]
    known = inspect.signature(ours).parameters
    fixed = [name for name, argument in known.items() if argument.kind is not argument.VAR_KEYWORD]
    return names[: len(fixed)] == fixed and (len(names) == len(fixed) or len(fixed) < len(known))


def planned(model: nn.Module, source: FileSource, **options: Any) -> LoadPlan:
    """The plan of a model whose package says afterwards what is missing, unexpected, or of another dtype."""
    try:
        # Any device that is real: where each tensor belongs is seen later.
        return trace(model, source, device="cpu", allow_missing="*", allow_unexpected="*", cast="loader", **options)
    except PlanError as error:
        error.advice = ""  # It names arguments of other functions.
        raise


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
