"""``from_pretrained`` and ``reading``: diffusers makes pipelines; weights are read as by ``hotweights.load``.

As with transformers, one function of its is another one meanwhile: ``ModelMixin._load_pretrained_model``.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...arguments import check_kind
from ...errors import MissingPackage, UsageError
from ...model.materialise import dressed
from ...model.places import places
from ...notices import log
from ...sources.contracts import IOMode
from ...sources.files.directory import snapshot
from ...sources.files.source import FileSource
from ...sources.locating import naming_files
from .. import transformers
from ..filling import HOW, How, Loader, fill, our_errors, planned, to_meta
from .attention import names_on_load

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
    with _LOADER.replaced.meanwhile(), transformers.reading(io=io, threads=threads, show_progress=show_progress):
        yield


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise MissingPackage("diffusers", "diffusers") from error
    return diffusers


def _fill(
    cls: Any,
    model: Any,
    state_dict: Any,
    resolved_model_file: list[str],
    pretrained_model_name_or_path: Any,
    loaded_keys: list[str],
    **options: Any,
) -> Any:
    """In place of ``ModelMixin._load_pretrained_model``: fill a model whose parameters are on meta from these files."""
    original = functools.partial(_LOADER.replaced.original.__func__, cls)  # type: ignore[attr-defined]
    files, name, how = resolved_model_file, pretrained_model_name_or_path, HOW.get()
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
    if options.get("ignore_mismatched_sizes"):
        return "tensors of another shape stay out of it (ignore_mismatched_sizes=True)"
    if not options.get("low_cpu_mem_usage"):
        return "its parameters have memory already (low_cpu_mem_usage=False)"
    if others := [os.path.basename(file) for file in files if not str(file).endswith(".safetensors")]:
        return f"{others[0]} is no safetensors file"
    return ""


def _read(model: Any, files: Sequence[str], one_file: bool, how: How, options: dict[str, Any]) -> None:
    from diffusers.models.model_loading_utils import _determine_param_device

    with FileSource([os.fspath(file) for file in files]) as source, naming_files(source):
        # Names of before attention had its own class: diffusers knows them in checkpoints of one file.
        names = names_on_load(model, source.manifest) if one_file else {}

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
        plan = planned(model, source, rename=rename)

        def device_of(name: str) -> torch.device:
            return torch.device(_determine_param_device(name, options.get("device_map")))

        fill(model, source, plan, how, device_of, rename)


_LOADER = Loader("diffusers", lambda: _diffusers().ModelMixin, classmethod(_fill))  # type: ignore[arg-type]
