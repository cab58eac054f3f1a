"""PEFT: weights of an adapter, of the model under it, or of both, into a model that has the adapter. peft is imported
when one of them is called.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..arguments import check_model
from ..errors import CheckpointError, MissingPackage, PlanError, UsageError
from ..live.model import LiveModel
from ..live.report import UpdateReport
from ..live.state import State
from ..loading.load import load
from ..loading.report import LoadReport
from ..model.places import places
from ..names import inside, outer_prefix, under_adapters, unwrapped
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


_KINDS_MADE_OF_BASE = {"ADAMSS", "OSF", "PSOFT", "TINYLORA"}
_INITS_THAT_CHANGE_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")


def load_adapter(
    model: LiveModel | nn.Module,
    adapter: AnySource,
    *,
    adapter_name: str = "default",
    base: Paths | None = None,
    **options: Any,
) -> UpdateReport | LoadReport:
    """Put an adapter's weights into the model's adapter of that name, in place. All else stays as it is.

    Names are those that peft writes, without the adapter's own. All of the adapter must be there, and nothing beyond
    but whole embeddings, which peft saves too where the adapter is one of theirs or the vocabulary was resized. Into a
    live model it is one update, all or nothing.

    Args:
        model: a live model; or a module: a ``PeftModel``, or another that holds adapters, in whatever wrappers.
        adapter: a directory that ``save_pretrained`` wrote, whose ``adapter_config.json`` must say what the model's
            adapter computes by: rank, ``lora_alpha`` and so on. Or any other source; of that only names are compared.
        adapter_name: which of the model's adapters.
        base: a checkpoint of the model under the adapters, that comes with it as one version. ``adapter`` is a path.
        options: of ``LiveModel.update``, such as ``version``; of ``hotweights.load`` for a module.

    Raises:
        PlanError: the adapter is another than the model's, or ``base`` is given, and the adapter was made of another
            base; nothing was read or written.
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
            if isinstance(source, Participant):
                # What a group is offered is compared within the update, which aborts if it does not fit.
                renamed = cache(lambda: _compared(names, dict, source.manifest, adapter_name))
                written = {*names.values()}
            else:
                embeddings = partial(_embeddings, module, holder, adapter_name)
                found = _compared(names, embeddings, source.manifest, adapter_name)
                renamed = cache(lambda: found)
                written = {*found.values()}
            if base is None:
                _check_loaded(model, source)
                return _put(model, source, renamed, written, options)
            if not isinstance(source, FileSource):
                raise UsageError("base= goes with an adapter that is a path; this one is none")
            _check_base(holder)
            with _together(base, source) as both:
                return _put(model, both, renamed, _base(module, holder, adapter_name) | written, options)


def load_base(model: LiveModel | nn.Module, base: AnySource, **options: Any) -> UpdateReport | LoadReport:
    """Put weights into the model under the adapters, in place; these stay as they are.

    Args:
        model: as in ``load_adapter``. An empty live model is loaded, and serves.
        base: whatever ``hotweights.load`` takes, with the names that the model has without adapters.
        options: of ``LiveModel.load`` or ``update``; of ``hotweights.load`` for a module.

    Raises:
        PlanError, CheckpointError, UpdateAborted: as there.
        PlanError: ``base`` is a path, and an adapter was made of the weights that are there; nothing was written.
        UsageError: the model has no adapters.
        MissingPackage: peft is not installed.
    """
    with refusing(base):
        module = _module(model)
        holder = _holder(module)
        if is_paths(base):
            _check_base(holder)
        return _put(model, base, dict, _base(module, holder, None), options)


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

    module = _module(model)
    stay = _tensors(module) - {*written}
    report: UpdateReport | LoadReport
    if not isinstance(model, LiveModel):
        report = load(model, source, rename=rename, allow_missing=_exactly(stay), **options)
    elif model.state is not State.EMPTY:
        report = model.update(source, rename=rename, only=_exactly(written) if stay else None, **options)
    else:
        report = model.load(source, rename=rename, allow_missing=_exactly(stay), **options)
    _remember(module)
    return report


def _remember(module: nn.Module) -> None:
    """Take copies of the rows of embeddings that peft puts back when it unmerges an adapter of single tokens."""
    layers: list[Any] = [*module.modules()]
    for layer in layers:
        for name, rows in dict(getattr(layer, "trainable_tokens_original", None) or {}).items():
            rows.detach().copy_(layer.get_base_layer().weight.detach()[layer.token_indices[name]])


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


def _names(module: nn.Module, holder: Any, adapter_name: str, **options: Any) -> dict[str, str]:
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
    inner = unwrapped(module)
    tensors = {place.name: place.tensor for place in places(inner)}
    any_name = {id(tensor): name for name, tensor in tensors.items()}
    beyond = outer_prefix(holder)
    ours = dict(any_name)
    state: dict[str, Tensor] = {}
    for name, tensor in holder.state_dict(keep_vars=True).items():
        bare = name.removeprefix(beyond)
        state[name] = tensor.detach()  # An object for each name: a tensor that is shared has several.
        ours[id(state[name])] = bare if tensors.get(bare) is tensor else any_name.get(id(tensor), "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It says where it looks for embeddings.
        filed = get_peft_model_state_dict(
            holder, state, adapter_name=adapter_name, **{"save_embedding_layers": False, **options}
        )
    if odd := [name for name, tensor in filed.items() if ours.get(id(tensor)) not in tensors]:
        raise PlanError(
            f"what peft saves of the adapter {adapter_name!r} is no tensor of the model, so it has no place; load it "
            "by peft itself; nothing was read or written",
            [f"{name}: computed when it is saved" for name in odd],
        )
    return {name.removeprefix(_PREFIX): ours[id(tensor)] for name, tensor in filed.items()}


def _embeddings(module: nn.Module, holder: Any, adapter_name: str) -> dict[str, str]:
    """What peft saves beside an adapter of embeddings, or where the vocabulary was resized: these as they are."""
    try:
        return _names(module, holder, adapter_name, save_embedding_layers=True)
    except NotImplementedError:  # A model of images, say, has none.
        return {}


def _base(module: nn.Module, holder: Any, adapter_name: str | None) -> set[str]:
    """The tensors of the model under the adapters, but for what is saved with the adapters other than this one."""
    inner = unwrapped(module)
    tensors = {place.name: place.tensor for place in places(inner) if place.persistent}
    others = (name for name in holder.peft_config if name != adapter_name)
    saved = {id(tensors[tensor]) for name in others for tensor in _names(module, holder, name).values()}
    return {name for name in under_adapters(inner) if name in tensors and id(tensors[name]) not in saved}


# What comes.


def _check_base(holder: Any) -> None:
    """Refuse other weights under adapters that were computed of those that are there: they would not fit together."""
    problems = [f"{name}: {how}" for name, config in holder.peft_config.items() if (how := _made_of_base(config))]
    if problems:
        raise PlanError(
            "an adapter of the model was made of the weights under it, and goes with no others; nothing was read or "
            "written",
            problems,
            advice="Load the base before the adapter is added by peft. An adapter of LoRA that save_pretrained("
            "directory, path_initial_model_for_weight_conversion=...) of peft wrote goes with any.",
        )


def _made_of_base(config: Any) -> str:
    """How an adapter was computed of the weights under it, or has changed them; empty if it was not."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind in _KINDS_MADE_OF_BASE:
        return f"adapters of {kind} begin with a decomposition of the weights under them"
    how = getattr(config, "init_lora_weights", None)
    return f"init_lora_weights={how!r} has changed the weights under it" if _changes_base(how) else ""


def _changes_base(how: object) -> bool:
    return isinstance(how, str) and how.lower().startswith(_INITS_THAT_CHANGE_BASE)


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
        if key in found and value != found[key] and (key not in _OF_THE_PAST or _on_another_base(key, value, found))
    ]
    if differing:
        raise PlanError(
            f"{directory}: this adapter computes by other values than the model's; nothing was read or written",
            differing,
        )
    # Beside it may lie the weights of its base model, which a directory stands for first.
    file = directory / "adapter_model.safetensors"
    return file if file.is_file() else directory


def _on_another_base(key: str, value: object, found: Mapping[str, Any]) -> bool:
    """Whether two adapters of LoRA lie on different weights, because the beginning of one has changed them."""
    return key == "init_lora_weights" and (_changes_base(value) or _changes_base(found[key]))


def _said(value: object) -> str:
    return repr(getattr(value, "value", value))  # Of an enumeration, as the file says it.


def _compared(
    names: Mapping[str, str],
    embeddings: Callable[[], Mapping[str, str]],
    manifest: Collection[str],
    adapter_name: str,
) -> dict[str, str]:
    """The model's names for those of the source, which has them all, and no others but perhaps whole embeddings."""
    prefix = _prefix_of(names, manifest)
    found = {name.removeprefix(prefix): name for name in manifest}
    known = dict(names)
    if found.keys() - names.keys():
        more = embeddings()
        known |= more if more.keys() <= found.keys() else {}  # peft saves all of them, or none.
    problems = [f"{name}: missing" for name in names.keys() - found.keys()]
    problems += [f"{found[name]}: unexpected; the model's adapter has none" for name in found.keys() - known.keys()]
    if problems and any("base_layer" in name.split(".") or f".{adapter_name}." in name for name in found):
        # Each of its names would be a problem: a model's own have the adapter's name in them.
        raise PlanError(
            f"the source is a whole model with adapters, not the adapter {adapter_name!r} alone; nothing was read or "
            f"written: {len(found)} names, as {some(list(found.values()), 3)}",
            advice=f"Give peft.get_peft_model_state_dict(model, adapter_name={adapter_name!r}, "
            "save_embedding_layers=False) in place of the model.",
        )
    if problems:
        raise PlanError(f"the source is not the adapter {adapter_name!r}; nothing was read or written", problems)
    return {found[name]: target for name, target in known.items()}


def _prefix_of(names: Collection[str], manifest: Collection[str]) -> str:
    """What all names of a source begin with: peft's, or a component's, as diffusers writes it: ``unet.``."""
    firsts = {name.partition(".")[0] for name in manifest}
    if len(firsts) != 1 or any(name.startswith(_PREFIX) or name in names for name in manifest):
        return _PREFIX
    return f"{firsts.pop()}."


@contextmanager
def _together(base: Paths, adapter: FileSource) -> Iterator[Source]:
    """One source of the files of both."""
    with FileSource(base) as under:
        files = under.files
    with FileSource([*files, *adapter.files]) as both:
        yield both
