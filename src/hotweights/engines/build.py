"""``build``: a model that serves, from its directory in one call. What makes transformers' models is in their file."""

from __future__ import annotations

import json
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .. import signals
from ..arguments import check_callable, check_kind, device_from
from ..dtypes import Cast
from ..errors import UsageError
from ..loading.initialise import InitMissing
from ..loading.load import load
from ..loading.verify import Verify
from ..manifest import Manifest
from ..memory.aliases import plain
from ..model.materialise import dressed
from ..model.places import places
from ..model.survey import By
from ..notices import log
from ..plan.patterns import Patterns
from ..rename import Rename
from ..sources.contracts import IOMode
from ..sources.files.directory import folder_in, snapshot
from ..sources.files.layout import SAFETENSORS
from ..sources.files.shards import Paths, path_of
from ..sources.opening import is_paths
from ..sources.opening import open as open_source
from . import transformers


def build(
    where: Paths,
    *,
    factory: Callable[[], nn.Module] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    allow_missing: Patterns = (),
    allow_partial: Patterns = (),
    allow_unexpected: Patterns = (),
    allow_mismatched: Patterns = (),
    init_missing: InitMissing | None = None,
    cast: Cast | None = None,
    rename: Rename | None = None,
    by: By | None = None,
    io: IOMode = "auto",
    threads: int | None = None,
    verify: Verify = "off",
    show_progress: bool | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    digests: str | os.PathLike[str] | None = None,
) -> Any:
    """Make the model of a checkpoint and load it: a cold start in one call. Weights are allocated once, on ``device``.

    A directory with a ``config.json`` of transformers gives the model that ``from_pretrained`` gives, bit for bit: its
    class is the architecture that the configuration names, and it is in eval mode. No code in the directory is run.
    Any other model is made by ``factory``, while its parameters go to meta as they are registered and its buffers are
    real: so those that no checkpoint carries have the values that the constructor gives them. Warnings of the load go
    to the logger ``hotweights``; ``hotweights.load`` gives the whole report.

    Args:
        where: a directory, a file, or what else of paths ``hotweights.open`` takes.
        factory: makes the model, without weights: ``lambda: Model(config)``.
        device: where all of the model lies.
        dtype: of the parameters. By default what the configuration says, or else what the checkpoint has; of a
            factory, what it makes.
        allow_missing: see ``hotweights.load``, as for all arguments below.
        allow_partial: names of the model of which some bytes may keep their values.
        allow_unexpected: tensors of the source that may have no place.
        allow_mismatched: names of the model that may have another shape.
        init_missing: fills what gets no bytes.
        cast: which casts that lose information are done: by default from float to float where a configuration or
            ``dtype`` says the dtype, as ``from_pretrained`` does; or else none.
        rename: new names for the source's tensors.
        by: which loading code is used.
        io: how files are read.
        threads: how many read at once.
        verify: ``"loader"`` proves the load.
        show_progress: whether to draw a progress bar.
        variant: which variant of the weights.
        subfolder: which folder in the directory; its ``config.json`` counts.
        digests: what the files must hold.

    Raises:
        CheckpointError: the checkpoint or the configuration is broken.
        PlanError: they do not fit each other.
        MissingPackage: transformers is needed and not installed.
        UsageError: there is no ``config.json``, and no ``factory``; or the factory makes no model.
    """
    if not is_paths(where):
        raise UsageError(
            f"hotweights.build takes the path of a checkpoint; this is a {type(where).__name__}. Make the model, and "
            "give both to hotweights.load"
        )
    check_callable(factory=factory)
    check_kind("dtype", dtype, torch.dtype, "a torch.dtype")
    target = device_from(device)
    assert target is not None
    with open_source(where, variant=variant, subfolder=subfolder, digests=digests) as source:
        directory = _directory(where, subfolder)
        if factory is not None:
            model = _made(factory, dtype)
        elif (directory / "config.json").is_file():
            model = transformers.build(directory, dtype=dtype or _dtype_of(directory, source.manifest))
        else:
            raise UsageError(
                f"{path_of(where)} has no config.json of transformers in a local folder, so nothing says what model it "
                "is; give factory=, a function that makes it: factory=lambda: Model(config)"
            )
        move_real(model, target)
        if cast is None and (dtype is not None or factory is None):
            cast = "floats"  # The dtype was chosen: by the caller, or by the configuration.
        report = load(
            model,
            source,
            device=target,
            allow_missing=allow_missing,
            allow_partial=allow_partial,
            allow_unexpected=allow_unexpected,
            allow_mismatched=allow_mismatched,
            init_missing=init_missing,
            cast=cast,
            rename=rename,
            by=by,
            io=io,
            threads=threads,
            verify=verify,
            show_progress=show_progress,
        )
    for warning in report.warnings:
        log(logging.WARNING, "%s", warning)
    return model


def _directory(where: Paths, subfolder: str | None) -> Path:
    """Where the configuration lies: not always beside the files, which an index may take from folders."""
    place = Path(where if isinstance(where, (str, os.PathLike)) else where[0]).expanduser()
    if not place.is_dir():  # A file; or an address, where no configuration is read.
        return place.parent
    return folder_in(snapshot(place), subfolder, SAFETENSORS)


def _dtype_of(directory: Path, manifest: Manifest) -> torch.dtype | None:
    """That of the first float in the checkpoint, where the configuration says none: the rule of ``from_pretrained``."""
    try:
        config = json.loads((directory / "config.json").read_text())
        said = config.get("dtype") or config.get("torch_dtype")
    except (OSError, ValueError, AttributeError):
        return None  # What is wrong with it is told by whoever makes the model of it.
    floats = (spec.dtype for spec in manifest.values() if isinstance(spec.dtype, torch.dtype))
    return None if said else next((dtype for dtype in floats if dtype.is_floating_point), None)


def _made(factory: Callable[[], nn.Module], dtype: torch.dtype | None) -> nn.Module:
    with parameters_to_meta():
        model = factory()
    if not isinstance(model, nn.Module):
        raise UsageError(f"factory= makes a torch.nn.Module; this made a {type(model).__name__}")
    if dtype is not None:
        for parameter in model.parameters():
            if parameter.is_meta and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    return model


@contextmanager
@signals.held
def parameters_to_meta() -> Iterator[None]:
    """Inside, what this thread registers as a parameter is put on meta; ties and ``requires_grad`` stay."""
    thread = threading.get_ident()
    metas: dict[int, tuple[weakref.ref[nn.Parameter], torch.Tensor]] = {}

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> torch.Tensor | None:
        if parameter is None or threading.get_ident() != thread or not _can_be_meta(parameter):
            return None  # It stays as it is.
        known, meta = metas.get(id(parameter), (None, parameter))
        if known is None or known() is not parameter:  # A dead one may have had the same id.
            meta = dressed(torch.empty_like(parameter, device="meta"), parameter)
            metas[id(parameter)] = weakref.ref(parameter), meta
        return meta

    handle = register_module_parameter_registration_hook(register)  # type: ignore[arg-type]  # It may return one.
    try:
        yield
    finally:
        handle.remove()


def _can_be_meta(parameter: nn.Parameter) -> bool:
    """Not those of other classes: what these need besides their shape is unknown, so they keep their memory."""
    return type(parameter) is nn.Parameter and plain(parameter) and not parameter.is_meta


def move_real(model: nn.Module, device: torch.device) -> None:
    """Put on the device what is not on meta, buffers mostly; ties stay."""
    # This list keeps the old tensors alive: a new one may get the id of one that is gone.
    olds = [(place, place.tensor) for place in places(model)]
    moved: dict[int, torch.Tensor] = {}
    for place, old in olds:
        if not (old.is_meta or nn.parameter.is_lazy(old)) and (new := old.detach().to(device)).device != old.device:
            place.put(moved.setdefault(id(old), dressed(new, old)))
