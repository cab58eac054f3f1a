"""``from_pretrained`` and ``reading``: transformers makes the model; its weights are read as by ``hotweights.load``.

transformers decides everything but the reading: classes, configuration, dtypes, devices, ties, what is initialised, and
its report. One function of its is another one meanwhile: ``PreTrainedModel._load_pretrained_model``, which fills a
model on meta from files.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...arguments import check_kind
from ...errors import CheckpointError, MissingPackage, PlanError, UsageError
from ...manifest import Manifest
from ...model.places import Place, places
from ...model.survey import extra_states
from ...notices import log
from ...plan.plan import LoadPlan
from ...sources.contracts import IOMode
from ...sources.files.directory import snapshot
from ...sources.files.source import FileSource
from ...sources.locating import naming_files
from ...sources.reading import check_reading
from ...text import some
from ...tracing.transformers import destinations, rules
from ..filling import HOW, How, Loader, fill, our_errors, planned, read_as, to_meta
from .blank import class_named, keep_dtypes, of_own_code

Name = str | os.PathLike[str]


def from_pretrained(
    name_or_dir: Name | None,
    *,
    cls: Any = None,
    device: torch.device | str | int | None = None,
    io: IOMode = "auto",
    threads: int | None = None,
    show_progress: bool | None = None,
    local_files_only: bool = True,
    **options: Any,
) -> Any:
    """What ``AutoModelForX.from_pretrained`` gives, bit for bit, read as ``hotweights.load`` reads.

    Tensors are read straight into the model's own memory, on its device; nothing of it is a mapped file. Whatever
    transformers would refuse after reading, such as shapes that differ, is refused before the first byte is read.
    ``requires_grad`` is what the model's class says, which transformers forgets.

    Checkpoints that transformers quantises, offloads to disk or shards, and those that are no safetensors, are read by
    transformers itself; the logger ``hotweights`` says so.

    Call it in one thread at a time: transformers replaces methods of its classes meanwhile, such as ``tie_weights``,
    and of two threads that load at once the last one may put back what the first had put there.

    Args:
        name_or_dir: a directory, or a name in the cache of the hub; ``None`` with ``state_dict=`` and ``config=``.
        cls: ``AutoModelForCausalLM``, its like, or a model's class; by default what ``config.json`` says.
        device: on which all of it lies; or give ``device_map=`` as to transformers.
        io: how files are read, see ``hotweights.load``.
        threads: how many read at once; by default a few.
        show_progress: whether to draw a progress bar; by default on a terminal.
        local_files_only: whether a name is looked for in the hub's cache alone; ``False`` lets transformers fetch it.
        options: whatever transformers' ``from_pretrained`` takes: ``dtype``, ``device_map``, ``variant``,
            ``subfolder``, ``revision``, ``config``, ``attn_implementation``, ``ignore_mismatched_sizes``,
            ``output_loading_info``, values of the configuration such as ``num_labels``, and so on.

    Raises:
        CheckpointError: there is no such checkpoint, or it is broken, or transformers can make no model of it.
        PlanError: the checkpoint does not fit the model; nothing was read.
        MissingPackage: transformers is not installed.
    """
    transformers = _transformers()
    check_kind("name_or_dir", name_or_dir, (str, os.PathLike), "a directory or a name on the hub")
    if device is not None:
        if options.get("device_map") is not None:
            raise UsageError("device= and device_map= both say where the model lies; give one of them")
        options["device_map"] = _map_of(device)
    if name_or_dir is None and options.get("state_dict") is None:
        raise UsageError("give a directory or a name on the hub; or None, where state_dict= holds the weights")
    where = None if name_or_dir is None else str(snapshot(Path(name_or_dir)))
    options["local_files_only"] = local_files_only
    with (
        reading(io=io, threads=threads, show_progress=show_progress),
        our_errors("transformers", where or "state_dict=", local_files_only=local_files_only),
    ):
        if cls is None:
            cls = _class_of(transformers, where, options)
        if not callable(getattr(cls, "from_pretrained", None)):
            raise UsageError(f"cls= is a class with a from_pretrained, such as AutoModelForCausalLM; found {cls!r}")
        if local_files_only and where is not None and not os.path.exists(where) and hasattr(cls, "_model_mapping"):
            # An AutoModel asks the hub for an adapter all the same.
            options["adapter_kwargs"] = {"local_files_only": True, **(options.get("adapter_kwargs") or {})}
        return cls.from_pretrained(where, **options)


@contextmanager
def reading(*, io: IOMode = "auto", threads: int | None = None, show_progress: bool | None = None) -> Iterator[None]:
    """Inside, every ``from_pretrained`` of a model, whoever calls it, reads as ours does.

    It holds for the thread, or the task of asyncio, that entered it; other threads go on as ever. Errors that are not
    of the reading are those of transformers. The arguments are those of ``from_pretrained``.

    Raises:
        MissingPackage: transformers is not installed.
    """
    check_reading(io, threads, None, show_progress)
    with _LOADER.replaced.meanwhile(), read_as(How(io, threads, show_progress)):
        yield


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingPackage("transformers", "transformers") from error
    return transformers


def _map_of(device: torch.device | str | int) -> dict[str, Any] | None:
    """transformers needs accelerate for any map: where the model would lie anyway, there is none."""
    place = torch.device(device)
    return None if place == torch.get_default_device() else {"": place}


# Which class.

_OF_FILES = ("cache_dir", "revision", "token", "subfolder", "local_files_only")


def _class_of(transformers: Any, where: str | None, options: dict[str, Any]) -> Any:
    """The class that the configuration names; of an adapter, that of its base model."""
    config = options.get("config")
    if not isinstance(config, transformers.PretrainedConfig):
        how = {key: options[key] for key in _OF_FILES if key in options}
        trusted = bool(options.get("trust_remote_code"))
        name = _base_of(where, how) if config is None and where is not None else config
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trusted, **how)
    if options.get("trust_remote_code") and (own := of_own_code(config)) is not None:
        return getattr(transformers, own)
    return class_named(transformers, config)


def _base_of(where: str, how: dict[str, Any]) -> str:
    """The checkpoint itself; or the one that it is an adapter of."""
    from transformers.utils.peft_utils import find_adapter_config_file

    adapter = find_adapter_config_file(where, **how)
    if adapter is None or os.path.exists(os.path.join(where, how.get("subfolder", ""), "config.json")):
        return where
    return str(json.loads(Path(adapter).read_text())["base_model_name_or_path"])


# The reading.


def _fill(
    model: Any, state_dict: Any, checkpoint_files: list[str] | None, load_config: Any, expected_keys: Any = None
) -> Any:
    """In place of ``PreTrainedModel._load_pretrained_model``: fill a model that is on meta from these files."""
    how = HOW.get()
    # Without files there is nothing to read; with expected keys, a model that is whole gets an adapter.
    if how is None or not checkpoint_files or state_dict is not None or expected_keys is not None:
        return _LOADER.replaced.original(model, state_dict, checkpoint_files, load_config, expected_keys)
    if not (why := _left_to_transformers(model, checkpoint_files, load_config)):
        try:
            with FileSource(checkpoint_files) as source, naming_files(source):
                return _read(model, source, load_config, how), None
        except CheckpointError as error:
            if error.cause != "duplicate_tensor":
                raise
            why = "several of its files hold the same tensor, and transformers takes that of the last"
    log(logging.WARNING, "%s is read by transformers itself: %s", load_config.pretrained_model_name_or_path, why)
    return _LOADER.replaced.original(model, state_dict, checkpoint_files, load_config, expected_keys)


def _left_to_transformers(model: Any, files: list[str], config: Any) -> str:
    """Why we do not read it; empty if we do."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if config.hf_quantizer is not None:
        return "it is quantised, and transformers changes its tensors while it loads them"
    if extra_states(model):
        return "its modules keep extra state"
    if config.device_mesh is not None:
        return "it is sharded while it is loaded"
    if {"disk", "meta"}.intersection(map(str, (config.device_map or {}).values())):
        return "parts of it stay on disk"
    if is_deepspeed_zero3_enabled():  # type: ignore[no-untyped-call]
        return "DeepSpeed holds its parameters"
    if others := [os.path.basename(file) for file in files if not file.endswith(".safetensors")]:
        return f"{others[0]} is no safetensors file"
    return ""


def _read(model: Any, source: FileSource, config: Any, how: How) -> Any:
    """Read the source into the model, and say what transformers wants to know to finish it."""
    from transformers.integrations.accelerate import get_device

    for place in places(model):
        if place.persistent:
            to_meta(place)
    given = keep_dtypes(model, config.dtype_plan)
    model._weight_conversions = config.weight_mapping  # Those that the user gave are among them.
    plan = _planned(model, source, ignore_mismatched=config.ignore_mismatched_sizes)

    def device_of(name: str) -> torch.device:
        return torch.device(get_device(config.device_map, name, valid_torch_device=True))

    fill(model, source, plan, how, device_of)
    return _told(model, source.manifest, plan, config, given)


def _planned(model: Any, source: FileSource, *, ignore_mismatched: bool) -> LoadPlan:
    plan = planned(model, source, allow_mismatched="*")
    if plan.mismatched and not ignore_mismatched:
        raise PlanError(
            "source and model do not fit; nothing was read or written",
            [f"{name}: {shapes}" for name, shapes in plan.mismatched.items()],
            advice="ignore_mismatched_sizes=True initialises these anew.",
        )
    if plan.ties:
        pairs = [f"{other.source} (but {first.source})" for first, other in plan.ties]
        log(logging.WARNING, "of tensors with one place transformers takes the first; not taken: %s", some(pairs, 3))
    return replace(plan, ties=())


def _told(
    model: Any, manifest: Manifest, plan: LoadPlan, config: Any, given: Sequence[tuple[Place, torch.Tensor]]
) -> Any:
    """What transformers finishes the model by, and reports: the names that are missing, unexpected or mismatched."""
    from transformers.utils.loading_report import LoadStateDictInfo

    converted = rules(model, manifest).mismatched if plan.mismatched else {}
    where = destinations(model, manifest, config.weight_mapping)
    model._weight_conversions = [transform for transform in config.weight_mapping if transform.was_used()]
    known = {place.name: place for place in places(model) if place.persistent}
    mismatched = {
        (name, torch.Size(manifest[source].shape), known[name].tensor.shape)
        for source, names in where.items()
        for name in names
        if name in plan.mismatched and name not in converted
    }
    mismatched |= {(name, torch.Size(misfit.found), known[name].tensor.shape) for name, misfit in converted.items()}
    for place in known.values():
        if not place.tensor.is_meta:
            place.tensor.__dict__["_is_hf_initialized"] = True
    for place, before in given:
        if place.tensor.is_meta:  # It is missing: initialised in the dtype that its class gives it.
            place.put(before)
    counters = {name for step in plan.steps if not step.sources for name in step.destinations}  # They were set to zero.
    absent = {name for name, place in known.items() if place.tensor.is_meta} | counters
    return LoadStateDictInfo(
        missing_keys=absent - plan.mismatched.keys(),
        unexpected_keys={name for names in where.values() for name in names if name not in known},
        mismatched_keys=mismatched,  # type: ignore[arg-type]
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )


_LOADER = Loader("transformers", lambda: _transformers().PreTrainedModel, staticmethod(_fill))
