"""diffusers: ``from_pretrained``, ``reading`` and ``live``. It makes pipelines and models; their weights are read as by
``hotweights.load``. diffusers is imported when they are called.

As with transformers, one function of its is another one meanwhile: ``ModelMixin._load_pretrained_model``.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from ..arguments import check_kind, shown
from ..errors import MissingPackage, PlanError, UnknownName, UsageError
from ..live.model import LiveModel
from ..manifest import Manifest
from ..model.materialise import dressed
from ..model.places import places
from ..notices import log
from ..plan.patterns import matches
from ..plan.steps import Copy
from ..sources.contracts import IOMode
from ..sources.files.directory import snapshot
from ..sources.files.source import FileSource
from ..sources.iterator import IteratorSource, from_iterator
from ..sources.locating import naming_files
from ..text import some
from ..tracing.frameworks import rules_for
from ..tracing.replaced import Replaced
from ..tracing.trace import trace
from . import transformers
from .filling import HOW, How, fill, our_errors, to_meta

_ARGUMENTS = ("cls", "model", "state_dict", "resolved_model_file", "pretrained_model_name_or_path", "loaded_keys")
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def from_pretrained(
    name_or_dir: str | os.PathLike[str],
    *,
    cls: Any = None,
    io: IOMode = "auto",
    threads: int | None = None,
    show_progress: bool | None = None,
    local_files_only: bool = True,
    **options: Any,
) -> Any:
    """What ``DiffusionPipeline.from_pretrained`` gives, bit for bit, read as ``hotweights.load`` reads.

    All components of a pipeline are read so, those of transformers too. Shapes that differ are refused before the first
    byte is read. What diffusers quantises, shards or offloads to disk, and what is no safetensors, it reads itself; the
    logger ``hotweights`` says so.

    Args:
        name_or_dir: a directory, or a name in the cache of the hub.
        cls: a class of pipelines or of models, such as ``UNet2DConditionModel``; by default the pipeline that
            ``model_index.json`` names.
        io: how files are read, see ``hotweights.load``.
        threads: how many read at once; by default a few.
        show_progress: whether to draw a progress bar; by default on a terminal.
        local_files_only: whether a name is looked for in the hub's cache alone; ``False`` lets diffusers fetch it.
        options: whatever diffusers' ``from_pretrained`` takes: ``dtype``, ``variant``, ``subfolder``, ``device_map``,
            components that take the place of others, and so on.

    Raises:
        CheckpointError: there is no such checkpoint, or it is broken, or diffusers can make nothing of it.
        PlanError: a checkpoint does not fit its model; of this one nothing was read.
        MissingPackage: diffusers or transformers is not installed.
    """
    check_kind("name_or_dir", name_or_dir, (str, os.PathLike), "a directory or a name on the hub")
    cls = _diffusers().DiffusionPipeline if cls is None else cls
    if not callable(getattr(cls, "from_pretrained", None)):
        raise UsageError(f"cls= is a class with a from_pretrained, such as DiffusionPipeline; found {cls!r}")
    where = str(snapshot(Path(name_or_dir)))
    with (
        reading(io=io, threads=threads, show_progress=show_progress),
        our_errors("diffusers", where, local_files_only=local_files_only),
    ):
        return cls.from_pretrained(where, local_files_only=local_files_only, **options)


@contextmanager
def reading(*, io: IOMode = "auto", threads: int | None = None, show_progress: bool | None = None) -> Iterator[None]:
    """Inside, every ``from_pretrained`` of diffusers and transformers reads as ours does, whoever calls it.

    It holds for the thread, or the task of asyncio, that entered it. The arguments are those of ``from_pretrained``.

    Raises:
        MissingPackage: diffusers or transformers is not installed.
    """
    with _replaced().meanwhile(), transformers.reading(io=io, threads=threads, show_progress=show_progress):
        yield


# A pipeline that serves.


def live(pipeline: Any, **options: Any) -> LiveModel:
    """A live model of all models of a pipeline: a version is all of them. Names begin with the component's: ``unet.``.

    Args:
        pipeline: keeps its components; they are updated in place.
        options: those of ``LiveModel``.

    Raises:
        UsageError: a hook moves a model to the host and back (``enable_model_cpu_offload``): its addresses change.
    """
    models = _components(pipeline)
    if moved := [name for name, model in models.items() if type(vars(model).get("_hf_hook")).__name__ == "CpuOffload"]:
        raise UsageError(
            f"hooks move {some(moved)} to the host and back, and a live model keeps its addresses; "
            "pipeline.remove_all_hooks() takes them off"
        )
    return LiveModel(nn.ModuleDict(models), **options)


@contextmanager
def weights(
    pipeline: Any,
    directory: str | os.PathLike[str],
    *,
    components: Collection[str] | None = None,
    variant: str | None = None,
) -> Iterator[IteratorSource]:
    """The weights of a pipeline's directory as one source, for the ``load`` and ``update`` of what ``live`` made.

    It streams once, and is closed when the ``with`` ends.

    Args:
        pipeline: says which components are models, and what their tensors are called.
        directory: what ``save_pretrained`` of a pipeline wrote, or its snapshot in a hub cache.
        components: which of them; by default all models. ``update`` then needs ``only=``, such as ``only="unet.*"``.
        variant: which variant of the weights.

    Raises:
        CheckpointError: a component's checkpoint is not there, or broken.
        PlanError: transformers would have to convert a component's tensors.
        UnknownName: the pipeline has no such component.
    """
    models = _components(pipeline)
    asked = [*models] if components is None else [*components]
    for name in asked:
        if name not in models:
            raise UnknownName("component", name, [*models])
    where = snapshot(Path(directory))
    with ExitStack() as stack:
        parts: list[tuple[FileSource, dict[str, str]]] = []
        for name in asked:
            source = stack.enter_context(FileSource(where / name, variant=variant))
            parts.append((source, _names_in(models[name], name, source)))
        manifest = Manifest(
            msgspec.structs.replace(source.manifest[name], name=new)
            for source, names in parts
            for name, new in names.items()
        )
        pairs = ((names[name], tensor) for source, names in parts for name, tensor in source.tensors() if name in names)
        yield stack.enter_context(from_iterator(pairs, manifest, borrowed=False))


def _components(pipeline: Any) -> dict[str, nn.Module]:
    components = getattr(pipeline, "components", None)
    if not isinstance(components, Mapping):
        raise UsageError(f"a pipeline is a DiffusionPipeline of diffusers; found {shown(pipeline)}")
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def _names_in(model: Any, component: str, source: FileSource) -> dict[str, str]:
    """The names of a component's tensors in the pipeline, for those of its checkpoint that have a place."""
    rules = rules_for(model, source.manifest)
    if rules.steps is None:
        fixed = getattr(model, "_fix_state_dict_keys_on_load", None)
        names = {name: name for name in source.manifest} if fixed is None else _renamed(model, source.manifest)
    else:
        copies = [step for _, step in rules.steps if isinstance(step, Copy)]
        names = {step.source: step.destination for step in copies}
        made = [name for _, step in rules.steps if step not in copies for name in step.destinations]
        if rules.problems or made:
            raise PlanError(
                f"{component}: transformers converts tensors of this model, so it cannot be a part of a live pipeline",
                rules.problems or made,
            )
        skipped = matches(rules.skip)
        names |= {name: name for name in source.manifest if name not in names and not skipped(name)}
    return {name: f"{component}.{new}" for name, new in names.items()}


# from_pretrained.


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise MissingPackage("diffusers", "diffusers") from error
    return diffusers


_FIRST = threading.Lock()


def _replaced() -> Replaced:
    with _FIRST:  # Two of them would each take the other's function for diffusers' own.
        return _replacement()


@functools.cache
def _replacement() -> Replaced:
    model_class = _diffusers().ModelMixin
    there = inspect.signature(model_class._load_pretrained_model.__func__)
    if tuple(there.parameters)[: len(_ARGUMENTS)] != _ARGUMENTS:
        raise UsageError(
            f"diffusers {_diffusers().__version__} fills its models in a way that hotweights does not know ({there}); "
            "use the from_pretrained of diffusers"
        )
    return Replaced(model_class, "_load_pretrained_model", classmethod(_fill))  # type: ignore[arg-type]


def _fill(
    cls: Any, model: Any, state_dict: Any, files: list[str], name: Any, loaded_keys: list[str], **options: Any
) -> Any:
    """In place of ``ModelMixin._load_pretrained_model``: fill a model whose parameters are on meta from these files."""
    original = functools.partial(_replaced().original.__func__, cls)  # type: ignore[attr-defined]
    how = HOW.get()
    if how is None:
        return original(model, state_dict, files, name, loaded_keys, **options)
    if why := _left_to_diffusers(files, options):
        log(logging.WARNING, "%s is read by diffusers itself: %s", name, why)
        return original(model, state_dict, files, name, loaded_keys, **options)
    _read(model, files, state_dict is not None, how, options)
    # It has nothing left to read; it compares the names, tells what it always tells, and returns it.
    return original(model, {}, files, name, loaded_keys, **options)


def _left_to_diffusers(files: Sequence[str], options: dict[str, Any]) -> str:
    """Why we do not read it; empty if we do."""
    if options.get("hf_quantizer") is not None or options.get("dtype") in _FP8:
        return "it is quantised, and diffusers changes its tensors while it loads them"
    if options.get("tp_shard_specs") is not None:
        return "it is sharded while it is loaded"
    if options.get("offload_state_dict") or "disk" in (options.get("device_map") or {}).values():
        return "parts of it stay on disk"
    if not options.get("low_cpu_mem_usage"):
        return "its parameters have memory already (low_cpu_mem_usage=False)"
    if others := [os.path.basename(file) for file in files if not str(file).endswith(".safetensors")]:
        return f"{others[0]} is no safetensors file"
    return ""


def _read(model: Any, files: Sequence[str], one_file: bool, how: How, options: dict[str, Any]) -> None:
    from diffusers.models.model_loading_utils import _determine_param_device

    with FileSource([os.fspath(file) for file in files]) as source, naming_files(source):
        # Names of before attention had its own class: diffusers knows them in checkpoints of one file.
        names = _renamed(model, source.manifest) if one_file else {}

        def rename(name: str) -> str:
            return names.get(name, name)

        renamed = set(map(rename, source.manifest))
        kept = options.get("keep_in_fp32_modules") or ()
        for place in places(model):
            if place.persistent and place.name in renamed:
                to_meta(place)
                dtype = torch.float32 if set(kept).intersection(place.name.split(".")) else options.get("dtype")
                if options.get("dtype") is not None and place.tensor.is_floating_point():
                    place.put(dressed(place.tensor.detach().to(dtype), place.tensor))
        try:
            plan = trace(
                model,
                source,
                device="cpu",  # Any that is real: where each tensor belongs is seen later.
                allow_missing="*",
                allow_unexpected="*",
                cast="loader",
                rename=rename,
            )
        except PlanError as error:
            error.advice = ""  # It names arguments of other functions.
            raise

        def device_of(name: str) -> torch.device:
            return torch.device(_determine_param_device(name, options.get("device_map")))

        fill(model, source, plan, how, device_of, rename)


def _renamed(model: Any, manifest: Manifest) -> dict[str, str]:
    """The names that diffusers gives to tensors of old checkpoints."""
    origins: dict[str, str] = {name: name for name in manifest}
    model._fix_state_dict_keys_on_load(origins)
    return {origin: name for name, origin in origins.items()}
