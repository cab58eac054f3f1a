"""Walk: what a trainer's tensors are called in its checkpoints, and which of them TRL leaves out."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ... import signals
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
