"""Walk: what a trainer's tensors are called in its checkpoints, and which of them TRL leaves out."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ... import signals
from ...sharding import is_dtensor
from ...sources.pairs import Pair

_WRAPPERS = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "modules_to_save.default.")


def buffers(model: nn.Module) -> Iterator[Pair]:
    """The buffers that a checkpoint has. TRL walks over parameters only; names are as it makes those."""
    adapter = getattr(model, "prefix", None) if hasattr(model, "peft_config") else None
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            full = f"{prefix}.{name}" if prefix else name
            left_out = buffer is None or name in module._non_persistent_buffers_set or "original_module" in full
            if left_out or (adapter is not None and adapter in full):
                continue
            full = full.removeprefix("base_model.model.").replace(".base_layer", "")
            for wrapper in _WRAPPERS:
                full = full.replace(wrapper, "")
            assert buffer is not None
            yield full, buffer


def _frozen(model: nn.Module) -> Iterator[Pair]:
    """Parameters that are not trained. Asynchronous trainers leave them out, unless adapters are trained."""
    if not hasattr(model, "peft_config"):
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                yield name.removeprefix("module.").replace("_checkpoint_wrapped_module.", ""), parameter


class WeightStream:
    """What an asynchronous trainer gives for one version, and beside it what it leaves out. An iterator."""

    def __init__(self, model: nn.Module, walk: Iterator[Pair], device: torch.device, *, sends: bool) -> None:
        """Nothing is gathered yet.

        Args:
            model: that of the trainer.
            walk: the trainer's own.
            device: where tensors are gathered.
            sends: whether all that is walked over is given; else only the trainer's own, and the rest is gathered
                because other processes do.
        """
        self._model = model
        self._pairs = self._given(walk, device, sends)

    def told(self, trained: Iterable[tuple[str, str, Sequence[int]]]) -> list[tuple[str, str, Sequence[int]]]:
        """What will come, by what the trainer has told of its own."""
        own = ((name, torch.empty(tuple(shape), dtype=getattr(torch, dtype))) for name, dtype, shape in trained)
        with torch.device("meta"):
            rest = ((name, torch.empty(tensor.shape, dtype=tensor.dtype)) for name, tensor in self._rest())
            saved = as_saved(self._model, itertools.chain(own, rest))
            return [(name, str(it.dtype).removeprefix("torch."), [*it.shape]) for name, it in saved]

    def __iter__(self) -> WeightStream:
        return self

    def __next__(self) -> Pair:
        return next(self._pairs)

    def _rest(self) -> Iterator[Pair]:
        return itertools.chain(_frozen(self._model), buffers(self._model))

    def _given(self, walk: Iterator[Pair], device: torch.device, sends: bool) -> Iterator[Pair]:
        if sends:
            yield from as_saved(self._model, itertools.chain(walk, self._gathered(device)))
        else:
            yield from walk
            for _ in self._gathered(device):
                pass

    def _gathered(self, device: torch.device) -> Iterator[Pair]:
        for name, tensor in self._rest():
            sharded: Any = tensor
            yield name, (sharded.full_tensor() if is_dtensor(tensor) else tensor.detach()).to(device)


def as_saved(model: nn.Module, pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Pairs that are called as in memory, by the names and in the shapes of the model's checkpoint, one by one.

    In memory transformers keeps the experts of a layer as one tensor, say, and engines know what checkpoints have.
    """
    core = _core(model)
    revert = _reverting(core)
    for name, tensor in pairs:
        if revert is None:
            yield name, tensor
        else:
            yield from _reverted(core, revert, name, tensor)


@signals.held
def _reverted(core: nn.Module, revert: Any, name: str, tensor: torch.Tensor) -> list[Pair]:
    with torch.no_grad():
        return list(revert(core, {name: tensor}).items())


def _core(model: nn.Module) -> nn.Module:
    """A model of transformers' within wrappers and adapters, if there is one."""
    modeling = sys.modules.get("transformers.modeling_utils")
    kind = () if modeling is None else modeling.PreTrainedModel
    return next((module for module in model.modules() if isinstance(module, kind)), model)


def _reverting(core: nn.Module) -> Any:
    """What gives a tensor as it is saved; ``None`` where that is as it is, or is made of several.

    Called for each tensor it costs as much as a small one's copy.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(core, modeling.PreTrainedModel) or hasattr(core, "hf_quantizer"):
        return None
    conversions = getattr(core, "_weight_conversions", None)
    if conversions is not None and not conversions:  # None is for models whose kind says what they are saved as.
        return None
    if any(len(conversion.target_patterns) > 1 for conversion in conversions or ()):
        return None
    return getattr(modeling, "revert_weight_conversion", None)
