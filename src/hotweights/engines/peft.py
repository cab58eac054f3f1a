"""PEFT: weights of an adapter, of the model under it, or of both, into a model that has the adapter. peft is imported
when one of them is called.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from ..arguments import check_model
from ..errors import CheckpointError, MissingPackage, PlanError, UsageError
from ..live.model import LiveModel
from ..live.report import UpdateReport
from ..live.state import State
from ..loading.load import load
from ..loading.report import LoadReport
from ..model.places import places
from ..names import inside, unwrapped
from ..sources.contracts import Participant, Source, refusing
from ..sources.files.directory import snapshot
from ..sources.files.shards import Paths
from ..sources.files.source import FileSource
from ..sources.opening import AnySource, is_paths, opened
from ..text import some

_PREFIX = "base_model.model."
"""What peft puts before names in files, and has before its own; models that hold adapters themselves have it not."""

# What a configuration says of how an adapter was made and of where it belongs, and not of what it computes. Which
# modules have one is seen by the names of its tensors.
_OF_THE_PAST = set(
    """
    auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config exclude_modules inference_mode
    init_lora_weights init_weights layer_replication layers_pattern layers_to_transform loftq_config lora_dropout
    lora_ga_config megatron_config megatron_core modules_to_save peft_version revision runtime_config target_modules
    target_parameters task_type
    """.split()
)


def load_adapter(
    model: LiveModel | nn.Module,
    adapter: AnySource,
    *,
    adapter_name: str = "default",
    base: Paths | None = None,
    **options: Any,
) -> UpdateReport | LoadReport:
    """Put an adapter's weights into the model's adapter of that name, in place. All else stays as it is.

    Names are those that peft writes, without the adapter's own. All of the adapter must be there, and nothing beyond.
    Into a live model it is one update, all or nothing.

    Args:
        model: a live model; or a module: a ``PeftModel``, or another that holds adapters, in whatever wrappers.
        adapter: a directory that ``save_pretrained`` wrote, whose ``adapter_config.json`` must say what the model's
            adapter computes by: rank, ``lora_alpha`` and so on. Or any other source; of that only names are compared.
        adapter_name: which of the model's adapters.
        base: a checkpoint of the model under the adapters, that comes with it as one version. ``adapter`` is a path.
        options: of ``LiveModel.update``, such as ``version``; of ``hotweights.load`` for a module.

    Raises:
        PlanError: the adapter is another than the model's; nothing was read or written.
        CheckpointError: a file is broken.
        UpdateAborted: see ``LiveModel.update``. So for what does not fit of a ``Receiver``, whose sender is told.
        UsageError: the model has no such adapter, or the live model is empty and there is no ``base``.
        MissingPackage: peft is not installed.
    """
    with refusing(adapter):
        module = _module(model)
        holder = _holder(module)
        names = _names(module, holder, adapter_name)
        if is_paths(adapter):
            adapter = _checked(adapter, holder.peft_config[adapter_name])
        with opened(adapter) as source:
            renamed = cache(lambda: _compared(names, source.manifest, adapter_name))
            if not isinstance(source, Participant):
                renamed()  # What a group is offered is compared within the update, which aborts if it does not fit.
            if base is None:
                _check_loaded(model, source)
                return _put(model, source, renamed, {*names.values()}, options)
            if not isinstance(source, FileSource):
                raise UsageError("base= goes with an adapter that is a path; this one is none")
            others = _all_but(module, holder, adapter_name)
            with _together(base, source) as both:
                return _put(model, both, renamed, {*_tensors(module)} - others, options)


def load_base(model: LiveModel | nn.Module, base: AnySource, **options: Any) -> UpdateReport | LoadReport:
    """Put weights into the model under the adapters, in place; these stay as they are.

    Args:
        model: as in ``load_adapter``. An empty live model is loaded, and serves.
        base: whatever ``hotweights.load`` takes, with the names that the model has without adapters.
        options: of ``LiveModel.load`` or ``update``; of ``hotweights.load`` for a module.

    Raises:
        PlanError, CheckpointError, UpdateAborted: as there.
        UsageError: the model has no adapters.
        MissingPackage: peft is not installed.
    """
    with refusing(base):
        module = _module(model)
        written = {*_tensors(module)} - _all_but(module, _holder(module), None)
        return _put(model, base, dict, written, options)


def _put(
    model: LiveModel | nn.Module,
    source: AnySource,
    names: Callable[[], Mapping[str, str]],
    written: Collection[str],
    options: Mapping[str, Any],
) -> UpdateReport | LoadReport:
    """Load or update these tensors of the model. ``names()`` are the model's for an adapter's in the source."""

    def rename(name: str) -> str:
        return names().get(name, name)

    stay = _tensors(_module(model)) - {*written}
    if not isinstance(model, LiveModel):
        return load(model, source, rename=rename, allow_missing=_exactly(stay), **options)
    if model.state is not State.EMPTY:
        return model.update(source, rename=rename, only=_exactly(written) if stay else None, **options)
    return model.load(source, rename=rename, allow_missing=_exactly(stay), **options)


def _check_loaded(model: LiveModel | nn.Module, source: Source) -> None:
    """Refuse an adapter alone as the first version: what it computes with would be undefined."""
    if isinstance(model, LiveModel) and model.state is State.EMPTY:
        both = "give base= as well, or " if isinstance(source, FileSource) else ""
        raise UsageError(
            f"nothing was loaded yet: {both}load the model under the adapters first, by load_base(live, source); then "
            "this adapter"
        )


def _exactly(names: Collection[str]) -> list[re.Pattern[str]]:
    return [re.compile(rf"\A(?:{'|'.join(map(re.escape, sorted(names)))})\Z")] if names else []


# Which tensors of the model.


def _module(model: LiveModel | nn.Module) -> nn.Module:
    module = model.model if isinstance(model, LiveModel) else model
    check_model(module)
    return module


def _tensors(module: nn.Module) -> set[str]:
    return {place.name for place in places(unwrapped(module)) if place.persistent}


def _holder(module: nn.Module) -> Any:
    """What peft takes for the model: the outermost module that knows its adapters, in whatever wrappers."""
    holder: nn.Module | None = module
    while holder is not None and not ("peft_config" in vars(holder) or hasattr(type(holder), "peft_config")):
        key = inside(type(holder))
        holder = None if key is None else holder._modules.get(key)
    if holder is None:
        raise UsageError(
            f"this {type(module).__name__} has no adapters; peft.PeftModel.from_pretrained(model, directory) gives it "
            "one"
        )
    return holder


def _names(module: nn.Module, holder: Any, adapter_name: str) -> dict[str, str]:
    """The model's names for those of an adapter's file: peft makes one of the model's tensors, which are recognised."""
    try:
        from peft.utils.save_and_load import get_peft_model_state_dict
    except ImportError as error:
        raise MissingPackage("peft", "peft") from error
    if adapter_name not in holder.peft_config:
        raise UsageError(
            f"the model has no adapter {adapter_name!r}; it has {some([*holder.peft_config])}. Before the model is "
            f"live, load_adapter(directory, adapter_name={adapter_name!r}) of peft gives it one"
        )
    ours = {id(place.tensor): place.name for place in places(unwrapped(module))}
    filed = get_peft_model_state_dict(
        holder, holder.state_dict(keep_vars=True), adapter_name=adapter_name, save_embedding_layers=False
    )
    if odd := [name for name, tensor in filed.items() if id(tensor) not in ours]:
        raise PlanError(
            f"what peft saves of the adapter {adapter_name!r} is no tensor of the model, so it has no place; load it "
            "by peft itself; nothing was read or written",
            [f"{name}: computed when it is saved" for name in odd],
        )
    return {name.removeprefix(_PREFIX): ours[id(tensor)] for name, tensor in filed.items()}


def _all_but(module: nn.Module, holder: Any, adapter_name: str | None) -> set[str]:
    """The tensors of all adapters but one."""
    others = [name for name in holder.peft_config if name != adapter_name]
    return {tensor for name in others for tensor in _names(module, holder, name).values()}


# What comes.


def _checked(adapter: Paths, expected: Any) -> Paths:
    """The file of the adapter in a directory, whose configuration is that of the model's adapter."""
    if not isinstance(adapter, (str, os.PathLike)) or not (directory := snapshot(Path(adapter))).is_dir():
        return adapter
    config = directory / "adapter_config.json"
    try:
        kind = json.loads(config.read_text())["peft_type"]
        # Of another kind it has other values, which this one would not take.
        found = (
            {"peft_type": kind} if kind != expected.peft_type else type(expected).from_pretrained(directory).to_dict()
        )
    except Exception as error:  # A wrong configuration breaks it in any way.
        raise CheckpointError(f"{config}: peft cannot read it: {error}") from error
    differing = [
        f"{key}: {_said(value)} expected, {_said(found[key])} found"
        for key, value in expected.to_dict().items()
        if key not in _OF_THE_PAST and key in found and value != found[key]
    ]
    if differing:
        raise PlanError(
            f"{directory}: this adapter computes by other values than the model's; nothing was read or written",
            differing,
        )
    # Beside it may lie the weights of its base model, which a directory stands for first.
    file = directory / "adapter_model.safetensors"
    return file if file.is_file() else directory


def _said(value: object) -> str:
    return repr(getattr(value, "value", value))  # Of an enumeration, as the file says it.


def _compared(names: Mapping[str, str], manifest: Collection[str], adapter_name: str) -> dict[str, str]:
    """The model's names for those of the source, which has them all, and no others."""
    found = {name.removeprefix(_PREFIX): name for name in manifest}
    problems = [f"{name}: missing" for name in names.keys() - found.keys()]
    problems += [f"{found[name]}: unexpected; the model's adapter has none" for name in found.keys() - names.keys()]
    if problems and any("base_layer" in name.split(".") or f".{adapter_name}." in name for name in found):
        # Each of its names would be a problem: a model's own have the adapter's name in them.
        raise PlanError(
            f"the source is a whole model with adapters, not the adapter {adapter_name!r} alone; nothing was read or "
            f"written: {len(found)} names, as {some(list(found.values()), 3)}",
            advice=f"Give peft.get_peft_model_state_dict(model, adapter_name={adapter_name!r}) in place of the model.",
        )
    if problems:
        raise PlanError(f"the source is not the adapter {adapter_name!r}; nothing was read or written", problems)
    return {found[name]: target for name, target in names.items()}


@contextmanager
def _together(base: Paths, adapter: FileSource) -> Iterator[Source]:
    """One source of the files of both."""
    with FileSource(base) as under:
        files = under.files
    with FileSource([*files, *adapter.files]) as both:
        yield both
