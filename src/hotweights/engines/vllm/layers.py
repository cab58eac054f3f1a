"""Layers: which layers vLLM processes after loading, and how it processes one.

This follows ``vllm.model_executor.model_loader.utils.process_weights_after_loading``, which does it for a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO
from vllm.model_executor.model_loader.utils import device_loading_context

from ...plan.patterns import matches

# Buffers that checkpoints rarely carry, and that have defaults: scales of the KV cache, and maps that vLLM computes.
_DEFAULTED = (
    *("*._k_scale", "*._v_scale", "*._q_scale", "*._prob_scale"),
    *("*._expert_map", "*.expert_mask", "*.expert_global_to_physical", "*.expert_physical_to_global"),
    *("*.expert_local_to_global", "*.input_scale_ub"),
)


def is_processed(layer: nn.Module) -> bool:
    """Whether vLLM does anything with it after loading."""
    return _by_method(layer) or is_deferred_attention_layer(layer)


def _by_method(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "quant_method", None), QuantizeMethodBase)


def deferred(model: nn.Module) -> list[str]:
    """Names of the layers that are processed after all others, because they read them."""
    return [name for name, layer in model.named_modules(remove_duplicate=False) if is_deferred_attention_layer(layer)]


def processes_itself(model: nn.Module) -> bool:
    """Whether its class does something with the whole model after loading."""
    return callable(getattr(model, "process_weights_after_loading", None)) and not is_deferred_attention_layer(model)


def processing(dtype: torch.dtype, device: torch.device) -> Callable[[nn.Module], None]:
    """What vLLM does with one layer; ``dtype`` is that of activations, ``device`` where layers are processed."""

    def process(layer: nn.Module) -> None:
        method: Any = getattr(layer, "quant_method", None)
        if _by_method(layer):
            moved = getattr(method, "requires_device_loading", True)
            with device_loading_context(layer, device) if moved else nullcontext():
                method.process_weights_after_loading(layer)
            if hasattr(layer, "update_param_tp_status"):
                layer.update_param_tp_status()  # type: ignore[operator]
        if is_deferred_attention_layer(layer):
            with device_loading_context(layer, device):
                layer.process_weights_after_loading(dtype)  # type: ignore[operator]

    return process


def may_be_missing(model: nn.Module, checkpoint: Iterable[str]) -> list[str]:
    """Names and patterns of what a checkpoint need not carry, because vLLM has defaults for it.

    Buffers are computed by vLLM, and few checkpoints have them: the means of images, say. Of whole numbers none is
    needed: they are indices. Another is needed if the first checkpoint, whose names are given, has any of its kind.
    """
    scales = [
        f"{name}.{key}"
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(getattr(layer, "quant_method", None), BaseKVCacheMethod)
        for key, _ in layer.named_parameters(recurse=False)
    ]
    kinds = {_kind(name) for name in checkpoint}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = [
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in parameters and isinstance(tensor, torch.Tensor)
        if not tensor.is_floating_point() or _kind(name) not in kinds
    ]
    names = [*parameters, *(name for name, _ in model.named_buffers(remove_duplicate=False))]
    defaulted = [pattern for pattern in _DEFAULTED if any(map(matches(pattern), names))]  # Idle ones are told of.
    return [*defaulted, *scales, *buffers]


def _kind(name: str) -> str:
    """The last two parts of a name, which say of what kind a tensor is: in each layer it has the same."""
    *_, owner, key = ("", *name.split("."))
    return f"{'*' if owner.isdecimal() else owner}.{key}"


def unwrap(model: nn.Module) -> None:
    """Undo vLLM's online processing: let loading code write at once, where it would collect tensors and process layers.

    A trace must see the writes, and a live model processes the layers itself.
    """
    for layer in model.modules():
        for tensor in (*layer._parameters.values(), *layer._buffers.values()):
            loader = getattr(tensor, "weight_loader", None)
            while getattr(loader, "__name__", "") == "online_process_loader":
                loader = tensor.weight_loader = loader.__wrapped__  # type: ignore[union-attr]
        if (info := LAYERWISE_INFO.get(layer)) is not None:
            info.reset()


Wrapped = list[tuple[nn.Module, str, nn.Module]]
"""The wrappers that LoRA has put around layers of a model: what has each, under which name, and it."""


def wrapped_by_lora(model: nn.Module) -> Wrapped:
    """All of them. It walks the model."""
    return [
        (parent, key, child)
        for parent in model.modules()
        for key, child in parent._modules.items()
        if child is not None and type(child).__module__.startswith("vllm.lora.") and hasattr(child, "base_layer")
    ]


@contextmanager
def without_lora(wrappers: Wrapped) -> Iterator[None]:
    """Inside, the layers that LoRA has wrapped stand in the place of their wrappers."""
    try:
        for parent, key, wrapper in wrappers:
            parent._modules[key] = wrapper.base_layer  # type: ignore[assignment]
        yield
    finally:
        for parent, key, wrapper in wrappers:
            parent._modules[key] = wrapper
