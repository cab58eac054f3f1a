"""transformers: the renamings and conversions of ``from_pretrained`` as steps of a plan."""

from __future__ import annotations

import copy
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..dtypes import OpaqueDtype
from ..manifest import Manifest, TensorSpec
from ..model.places import places
from ..names import bare_names
from ..plan.rules import Misfit, Rules
from ..plan.steps import Copy, Step
from ..sharding import is_dtensor
from .lower import lower
from .record import Recording, record


def owns(model: nn.Module) -> bool:
    """Whether ``model`` is a transformers model."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def _method(quantisation: Any) -> str | None:
    """The name that a ``quantization_config``, a dict or an object of transformers, gives its method."""
    facts = quantisation if isinstance(quantisation, dict) else vars(quantisation)
    method = facts.get("quant_method")
    return getattr(method, "value", method)


def _is_known(method: str | None) -> bool:
    """Whether transformers quantises by this method. Of one that it does not know it says so, and loads by name."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return method in (None, "bitsandbytes", *AUTO_QUANTIZATION_CONFIG_MAPPING)


def rules(model: Any, manifest: Manifest) -> Rules:
    """What ``from_pretrained`` would do with these names: what ``save_pretrained`` wrote is what loads.

    The renamings and conversions are those of ``transformers.conversion_mapping`` for the model's classes; the order of
    sources within a conversion, and the prefix of the base model, are found as in ``transformers.core_model_loading``.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return Rules(
            problems=(
                "the model is quantised by transformers, and its layers may hold their weights in another form than "
                "the checkpoint under the same names; model.load_state_dict takes what model.state_dict() gave",
            )
        )
    quantisation = getattr(model.config, "quantization_config", None)
    if quantisation is not None and _is_known(method := _method(quantisation)):
        return Rules(
            problems=(
                f"the model's configuration has a quantization_config ({method}), so transformers would quantise it; "
                "by name that cannot be done. hotweights.engines.transformers.from_pretrained gives what transformers "
                "makes of it. If the checkpoint holds plain weights, remove it from the configuration",
            )
        )
    names = _Names(model)
    steps: list[tuple[int, Step]] = []
    conversions: dict[str, _Conversion] = {}
    unknown: dict[str, str] = {}
    for source in names.in_order(manifest):
        target, pattern = names.target(source)
        if target not in names.known:
            unknown[source] = target
        elif pattern is None:
            steps.append((0, Copy(source, names.real.get(target, target))))
        else:
            conversions.setdefault(target, _Conversion(target, names.converters[pattern], model)).add(source, pattern)
    problems: list[str] = []
    odd: dict[str, Misfit] = {}
    sound = [conversion for conversion in conversions.values() if conversion.fits(manifest, names.known, problems, odd)]
    recording = _trace(model, manifest, sound, names)
    ignored = _ignored_when_unexpected(model)
    skipped = {source for source, target in unknown.items() if ignored is not None and ignored.search(target)}
    # Their targets may be missing and their sources go nowhere: saying so as well would only bury the reason.
    unsound = {target: conversion for target, conversion in conversions.items() if conversion not in sound}
    return Rules(
        steps=(*steps, *lower(recording.ops)),
        constants=recording.constants,
        skip=_exactly(skipped | {name for conversion in unsound.values() for name in conversion.sources}),
        allow_missing=[*ignored_when_missing(model), *_exactly({*unsound, *odd})],
        problems=tuple(problems),
        mismatched=odd,
        load=partial(_load, names, sound),
    )


def destinations(model: Any, manifest: Manifest, transforms: Sequence[Any]) -> dict[str, tuple[str, ...]]:
    """Where ``from_pretrained`` looks for a place of each tensor: names that the model has, or would have to have.

    Args:
        model: is looked at, not changed.
        manifest: of a checkpoint.
        transforms: renamings and conversions of transformers; those that apply are marked as used.
    """
    names = _Names(model, transforms)
    return {source: names.targets(source) for source in names.in_order(manifest)}


def initialise(model: Any, names: Iterable[str]) -> None:
    """Initialise the tensors with these names by the model's own rules, as ``from_pretrained`` does for missing ones.

    transformers leaves alone what has its flag: so everything else has it for as long as that takes.
    """
    wanted = set(names)
    everywhere = list(places(model))
    fresh = {id(place.tensor) for place in everywhere if place.name in wanted}
    flagged = {id(place.tensor): place.tensor for place in everywhere if id(place.tensor) not in fresh}
    before = [(owner, owner.__dict__.get(_FLAG)) for owner in (*flagged.values(), *model.modules())]
    try:
        for tensor in flagged.values():
            tensor.__dict__[_FLAG] = True
        for place in everywhere:
            if place.name in wanted:
                place.tensor.detach().zero_()  # What initialize_weights() leaves out would differ from run to run.
                place.tensor.__dict__.pop(_FLAG, None)
        for module in model.modules():
            module.__dict__.pop(_FLAG, None)
        model.initialize_weights()
    finally:
        for owner, flag in before:
            owner.__dict__.pop(_FLAG, None)
            if flag is not None:
                owner.__dict__[_FLAG] = flag


_FLAG = "_is_hf_initialized"


def _load(names: _Names, conversions: Sequence[_Conversion], pairs: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load real tensors: every conversion whose sources are all there, and the others by name."""
    tensors = dict(pairs)
    for conversion in conversions:
        if all(source in tensors for source in conversion.sources):
            for name, made in conversion.run({source: tensors.pop(source) for source in conversion.sources}).items():
                if names.known[name].shape == made.shape:  # Others are mismatched, and stay as they are.
                    names.known[name].detach().copy_(made)
    for source, tensor in tensors.items():
        names.known[names.target(source)[0]].detach().copy_(tensor)


def _exactly(names: Collection[str]) -> list[re.Pattern[str]]:
    return [re.compile(rf"\A(?:{'|'.join(map(re.escape, names))})\Z")] if names else []


def _trace(model: Any, manifest: Manifest, conversions: Sequence[_Conversion], names: _Names) -> Recording:
    """What the conversions do, recorded on fake tensors: a stack of experts becomes one copy for each."""
    taken = Manifest(manifest[name] for conversion in conversions for name in conversion.sources)
    # In place of a DTensor a whole tensor without data is written: the plan is cut down to this rank's part later.
    whole = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in names.known.items()
        if is_dtensor(tensor)
    }
    standing = copy.copy(names)
    standing.known = {**names.known, **whole}
    load = partial(_load, standing, conversions)
    recording = record(model, taken, load, device=torch.device("cpu"), stand_ins=whole)
    if recording.error is not None:
        raise recording.error
    return recording


class _Names:
    """The renaming of checkpoint names to the model's, by transformers' own transforms."""

    def __init__(self, model: Any, transforms: Sequence[Any] | None = None) -> None:
        from transformers import core_model_loading

        self._core = core_model_loading
        transforms = _transforms(model) if transforms is None else transforms
        self._renamings = [
            transform for transform in transforms if isinstance(transform, core_model_loading.WeightRenaming)
        ]
        self._converters = [
            transform for transform in transforms if isinstance(transform, core_model_loading.WeightConverter)
        ]
        self._prefix = model.base_model_prefix
        self.known = {place.name: place.tensor for place in places(model) if place.persistent}
        # Names without wrappers, such as an adapter's layers: transformers' transforms are made for those.
        self.real = {bare: name for name, (bare, _) in bare_names(model).items() if name in self.known}
        self.known |= {bare: self.known[name] for bare, name in self.real.items() if bare not in self.known}
        self.converters = {
            pattern: converter for converter in self._converters for pattern in converter.source_patterns
        }

    def in_order(self, manifest: Manifest) -> list[str]:
        """Names in the order in which conversions collect them: expert 2 before expert 10."""
        return sorted(manifest, key=self._core.dot_natural_key)

    def target(self, source: str) -> tuple[str, str | None]:
        """The model's name for a checkpoint's, and the pattern of its conversion, if it has one."""
        rename = self._core.rename_source_key
        renamed = rename(source, self._renamings, self._converters, self._prefix, self.known)
        if renamed[0] not in self.known and source in self.known:
            renamed = rename(source, [], [], self._prefix, self.known)
        target: str = renamed[0]
        pattern: str | None = renamed[1]
        return target, pattern

    def targets(self, source: str) -> tuple[str, ...]:
        """The same; of a conversion that makes nothing of the model's, all names that it would make."""
        target, pattern = self.target(source)
        if pattern is None or target in self.known:
            return (target,)
        made: list[str] = self.converters[pattern].target_patterns
        return tuple(target.replace(made[0], other) for other in made)


def _transforms(model: Any) -> list[Any]:
    """transformers' renamings and conversions for the model's classes, after those that its user gave.

    ``from_pretrained(key_mapping=)`` leaves these in the model, by which ``save_pretrained`` takes them back.
    """
    from transformers import conversion_mapping

    usual = conversion_mapping.get_model_conversion_mapping(model)
    own = getattr(model, "_weight_conversions", None) or ()
    known = {str(transform) for transform in usual}
    return [*(transform for transform in own if str(transform) not in known), *usual]


class _Conversion:
    """One conversion of transformers: the sources it collects for one target, and its operations."""

    def __init__(self, target: str, converter: Any, model: Any) -> None:
        self._target = target
        self._converter = converter
        self._model = model
        self._sources: list[tuple[str, str]] = []  # name, pattern

    def add(self, source: str, pattern: str) -> None:
        self._sources.append((source, pattern))

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of what it takes."""
        return tuple(name for name, _ in self._sources)

    def fits(
        self,
        manifest: Manifest,
        known: Mapping[str, torch.Tensor],
        problems: list[str],
        mismatched: dict[str, Misfit],
    ) -> bool:
        """Whether it makes something that the model has, tried on tensors without data before a byte moves.

        Says of the rest why not: in ``problems``, or in ``mismatched`` where only the shape is another.
        """
        specs = [manifest[name] for name in self.sources]
        wrong = [
            f"{spec}: torch has no such type, and it would have to be converted"
            for spec in specs
            if isinstance(spec.dtype, OpaqueDtype)
        ]
        failed: list[str] = []
        made = {} if wrong else self._made(specs, known, failed)
        gaps = [line for _, names in self._lists() for line in _gaps(self._target, names)]
        odd = {name: tensor.shape for name, tensor in made.items() if known[name].shape != tensor.shape}
        for name, shape in odd.items():
            found, expected = list(shape), list(known[name].shape)
            shapes = f"{found} in the source, {expected} in the model"
            problem = f"{name}: shape {expected} expected, {found} found (from {self.sources[0]})"
            mismatched[name] = Misfit(self.sources, shape, "; ".join((shapes, *gaps)), tuple(gaps) or (problem,))
        wrong += [] if odd else gaps or failed
        problems += wrong
        return not wrong and len(odd) < len(made)

    def _made(
        self, specs: Sequence[TensorSpec], known: Collection[str], problems: list[str]
    ) -> dict[str, torch.Tensor]:
        try:
            made = self.run({spec.name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs})  # type: ignore[arg-type]
        except Exception as error:  # Whatever their operations raise on shapes that do not fit.
            odd = [spec for group in self._groups(specs) for spec in _odd(group)] or specs[:3]
            problems.append(f"{self._target}: transformers cannot make it of {'; '.join(map(str, odd))}: {error}")
            return {}
        unknown = [f"{name}: made of {self.sources[0]}, but the model has no such name" for name in made.keys() - known]
        problems += unknown
        return {} if unknown else made

    def _groups(self, specs: Sequence[TensorSpec]) -> Iterator[list[TensorSpec]]:
        for _, names in self._lists():
            yield [spec for spec in specs if spec.name in names]

    def _lists(self) -> Iterator[tuple[str, list[str]]]:
        for pattern in dict.fromkeys(pattern for _, pattern in self._sources):
            yield pattern, [name for name, collected_by in self._sources if collected_by == pattern]

    def run(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The operations of transformers. ``tensors`` is emptied: what they have used is let go as they go on."""
        converter = copy.deepcopy(self._converter)
        for name, pattern in self._sources:
            converter.add_tensor(self._target, name, pattern, tensors.pop(name))
        made = converter.convert(self._target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _gaps(target: str, names: Sequence[str]) -> list[str]:
    """What is wrong with names that one pattern collects, unless they are one name numbered 0, 1, 2 and so on.

    transformers stacks what there is: behind a gap, every expert would take the place of another.
    """
    if len(names) < 2:
        return []
    parts = [re.split(r"(\d+)", name) for name in names]
    differing = [index for index in range(len(parts[0])) if len({tuple(part[index : index + 1]) for part in parts}) > 1]
    if len({len(part) for part in parts}) > 1 or len(differing) != 1 or not parts[0][differing[0]].isdigit():
        return [f"{target}: {names[0]} and {names[1]} would both become it, and only one can"]
    (column,) = differing
    numbers = [int(part[column]) for part in parts]
    absent = sorted(set(range(max(numbers))) - set(numbers))
    example = parts[0]
    before, after = "".join(example[:column]), "".join(example[column + 1 :])
    return [f"{before}{number}{after}: missing; others of {target} are there" for number in absent]


def _odd(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The specs that have another shape than most."""
    (usual, _), *_ = Counter(spec.shape for spec in specs).most_common(1)
    return [spec for spec in specs if spec.shape != usual]


def ignored_when_missing(model: Any) -> list[re.Pattern[str]]:
    """Names that ``from_pretrained`` does not miss."""
    return [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]


def _ignored_when_unexpected(model: Any) -> re.Pattern[str] | None:
    patterns = list(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    # Buffers of old checkpoints that are computed by now; from_pretrained drops them without a word.
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns)) if patterns else None
