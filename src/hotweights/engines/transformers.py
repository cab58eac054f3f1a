"""transformers: its renamings, conversions and ties as steps of a plan; its models on meta. It loads nothing itself."""

from __future__ import annotations

import copy
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, MissingPackage
from ..manifest import Manifest, OpaqueDtype, TensorSpec
from ..plan import Copy, Program, Step
from . import Rules

__all__ = ["build", "owns", "rules"]


def owns(model: nn.Module) -> bool:
    """Whether ``model`` is a transformers model."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def rules(model: Any, manifest: Manifest) -> Rules:
    """What ``from_pretrained`` would do with these names: what ``save_pretrained`` wrote is what loads.

    The renamings and conversions are those of ``transformers.conversion_mapping`` for the model's classes; the order of
    sources within a conversion, and the prefix of the base model, are found as in ``transformers.core_model_loading``.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return Rules(problems=("the model is quantised by transformers; by name its weights cannot be converted",))
    names = _Names(model)
    steps: list[Step] = []
    conversions: dict[str, _Conversion] = {}
    unknown: dict[str, str] = {}
    for source in names.in_order(manifest):
        target, pattern = names.target(source)
        if target not in names.known:
            unknown[source] = target
        elif pattern is None:
            steps.append(Copy(source, target))
        else:
            conversions.setdefault(target, _Conversion(target, names.converters[pattern], model)).add(source, pattern)
    problems: list[str] = []
    for conversion in conversions.values():
        step = conversion.step(manifest, problems)
        if step is not None:
            steps.append(step)
    ignored = _ignored_when_unexpected(model, names.known)
    skipped = [source for source, target in unknown.items() if ignored is not None and ignored.search(target)]
    return Rules(
        steps=tuple(steps),
        skip=[re.compile(f"^(?:{'|'.join(map(re.escape, skipped))})$")] if skipped else (),
        allow_missing=[re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()],
        problems=tuple(problems),
    )


class _Names:
    """The renaming of checkpoint names to the model's, by transformers' own transforms."""

    def __init__(self, model: Any) -> None:
        from transformers import conversion_mapping, core_model_loading

        self._core = core_model_loading
        transforms = conversion_mapping.get_model_conversion_mapping(model)
        self._renamings = [one for one in transforms if isinstance(one, core_model_loading.WeightRenaming)]
        self._converters = [one for one in transforms if isinstance(one, core_model_loading.WeightConverter)]
        self._prefix = model.base_model_prefix
        self.known: dict[str, torch.Tensor] = model.state_dict()
        self.converters = {pattern: one for one in self._converters for pattern in one.source_patterns}

    def in_order(self, manifest: Manifest) -> list[str]:
        """Names in the order in which conversions collect them: expert 2 before expert 10."""
        return sorted(manifest, key=self._core.dot_natural_key)

    def target(self, source: str) -> tuple[str, str | None]:
        """The model's name for a checkpoint's, and the pattern of its conversion, if it has one."""
        renamed = self._core.rename_source_key(source, self._renamings, self._converters, self._prefix, self.known)
        if renamed[0] not in self.known and source in self.known:
            return source, None
        target: str = renamed[0]
        pattern: str | None = renamed[1]
        return target, pattern


class _Conversion:
    """One conversion of transformers: the sources it collects for one target, and its operations."""

    def __init__(self, target: str, converter: Any, model: Any) -> None:
        self._target = target
        self._converter = converter
        self._model = model
        self._sources: list[tuple[str, str]] = []  # name, pattern

    def add(self, source: str, pattern: str) -> None:
        self._sources.append((source, pattern))

    def step(self, manifest: Manifest, problems: list[str]) -> Program | None:
        """The conversion as a program, tried on tensors without data: what it makes is known before a byte moves."""
        sources = tuple(name for name, _ in self._sources)
        specs = [manifest[name] for name in sources]
        opaque = [
            f"{spec}: torch has no such type, and it would have to be converted"
            for spec in specs
            if isinstance(spec.dtype, OpaqueDtype)
        ]
        if opaque:
            problems += opaque
            return None
        try:
            made = self._run({spec.name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs})  # type: ignore[arg-type]
        except Exception as error:  # Whatever their operations raise on shapes that do not fit.
            problems.append(
                f"{self._target}: transformers cannot make it of {', '.join(map(str, specs[:3]))}...: {error}"
            )
            return None
        produces = {name: TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in made.items()}
        return Program(sources, produces, self._run)

    def _run(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(self._converter)
        for name, pattern in self._sources:
            converter.add_tensor(self._target, name, pattern, tensors[name])
        made = converter.convert(self._target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _ignored_when_unexpected(model: Any, known: Mapping[str, torch.Tensor]) -> re.Pattern[str] | None:
    patterns = list(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    # Buffers of old checkpoints that are computed by now; from_pretrained drops them without a word.
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns)) if patterns else None


def build(config_dir: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Any:
    """The model that ``config.json`` in ``config_dir`` describes: parameters on meta, buffers real, in eval mode.

    Args:
        config_dir: a directory with a ``config.json``; nothing is fetched from anywhere.
        dtype: of the parameters; by default what the configuration says.

    Raises:
        CheckpointError: there is no usable ``config.json``.
        MissingPackage: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingPackage("transformers", "transformers") from error
    try:
        config = transformers.AutoConfig.from_pretrained(os.fspath(config_dir), local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config_dir}: no config.json that transformers understands: {error}") from error
    architecture = (getattr(config, "architectures", None) or [""])[0]
    model_class = getattr(transformers, architecture, None) if architecture else None
    make: Any = transformers.AutoModel.from_config if model_class is None else model_class._from_config
    with _parameters_on_meta():
        model = make(config, **({} if dtype is None else {"dtype": dtype}))
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that modules register meanwhile lose their memory at once; buffers keep theirs, with their values.

    ``torch.device("meta")`` would empty non-persistent buffers too, and no checkpoint carries those.
    """
    register: Callable[..., None] = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and not param.is_meta:
            emptied = type(param)(param.detach().to("meta"), requires_grad=param.requires_grad)
            emptied.__dict__.update(param.__dict__)
            self._parameters[name] = emptied

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
