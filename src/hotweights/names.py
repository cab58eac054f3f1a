"""Names: what a model's tensors are called by people who do not see the wrappers around and inside it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

_INSIDE: dict[tuple[str, str], str] = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"): "_fsdp_wrapped_module",
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"): "_checkpoint_wrapped_module",
    ("peft.peft_model", "PeftModel"): "base_model",
    ("peft.tuners.tuners_utils", "BaseTuner"): "model",
    ("peft.tuners.tuners_utils", "BaseTunerLayer"): "base_layer",
    ("peft.tuners.adaption_prompt.model", "AdaptionPromptModel"): "model",
    ("peft.tuners.adaption_prompt.layer", "_BaseAdaptedAttention"): "model",
    ("peft.utils.other", "AuxiliaryTrainingWrapper"): "original_module",
    ("peft.utils.other", "TrainableTokensWrapper"): "token_adapter",
}
"""Classes that wrap another module, and the child that is that module. They are known by class, never by a child's
name: a model may call a part of its own ``module``. Nothing is imported to find out.
"""

PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.")
"""What all names of a checkpoint begin with that was saved from a wrapped model."""

SPELLED = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"))
"""Parts of a name that only wrappers bring, wherever they stand in it."""


def inside(kind: type) -> str | None:
    """The name of the child that a module of this class wraps; ``None`` if it is no wrapper that is known."""
    keys = (_INSIDE.get((base.__module__, base.__qualname__)) for base in kind.__mro__)
    return next((key for key in keys if key is not None), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside the wrappers around ``model``, as far as these hold nothing beside it."""
    return _peeled(model)[1]


def outer_prefix(model: nn.Module) -> str:
    """What the wrappers around ``model`` put in front of the names: ``module._orig_mod.``, say."""
    return _peeled(model)[0]


def _peeled(model: nn.Module) -> tuple[str, nn.Module]:
    prefix = ""
    while (key := inside(type(model))) is not None and [*model._modules] == [key]:
        child = model._modules[key]
        if child is None or model._parameters or model._buffers:
            break
        prefix, model = f"{prefix}{key}.", child
    return prefix, model


def under_adapters(model: nn.Module) -> Iterator[str]:
    """The names of all parameters and buffers but those that adapters of PEFT bring."""
    stack = [("", model)]
    while stack:
        prefix, module = stack.pop()
        key = inside(type(module)) if type(module).__module__.startswith("peft.") else None
        if key is None:
            yield from (prefix + name for name in (*module._parameters, *module._buffers))
        stack += [
            (f"{prefix}{name}.", child)
            for name, child in module._modules.items()
            if child is not None and key in (None, name)
        ]


def bare_names(model: nn.Module) -> dict[str, tuple[str, str]]:
    """For each tensor that lies in a wrapper: its names without it, as the model and as an adapter's file has it.

    The two differ for the parts of an adapter: its file leaves the adapter's own name out.
    """
    return {name: (bare, filed) for name, bare, filed in _walk(model, "", "", "") if (bare, filed) != (name, name)}


def bare_modules(model: nn.Module) -> dict[str, str]:
    """The names of modules that are others without the wrappers. The wrapper and what it wraps have the same one."""
    bare: dict[str, str] = {}
    stack: list[tuple[str, str, nn.Module]] = [("", "", model)]
    while stack:
        prefix, short, module = stack.pop()
        if isinstance(module, torch.jit.ScriptModule):
            continue
        if prefix != short:
            bare[prefix[:-1]] = short[:-1]
        key = inside(type(module))
        for name, child in module._modules.items():
            if child is not None:
                stack.append((f"{prefix}{name}.", short if name == key else f"{short}{name}.", child))
    return bare


def _walk(module: nn.Module, real: str, bare: str, filed: str) -> Iterator[tuple[str, str, str]]:
    """The names of every parameter and buffer: as it is, without wrappers, and as an adapter's file has it."""
    if isinstance(module, torch.jit.ScriptModule):
        return  # It does not show its tensors.
    for key in (*module._parameters, *module._buffers):
        yield real + key, bare + key, filed + key
    wrapped = inside(type(module))
    adapters = (*getattr(module, "adapter_layer_names", ()), "modules_to_save") if wrapped is not None else ()
    for key, child in module._modules.items():
        if child is None:
            continue
        if key == wrapped:
            yield from _walk(child, f"{real}{key}.", bare, filed)
        elif key in adapters:  # One entry for each adapter.
            stem = filed if key == "modules_to_save" else f"{filed}{key}."
            for name in child._parameters:
                yield f"{real}{key}.{name}", f"{bare}{key}.{name}", stem[:-1]
            for name, part in child._modules.items():
                if part is not None:
                    named = _walk(part, f"{real}{key}.{name}.", f"{bare}{key}.{name}.", stem)
                    # DoRA's vector is a module of one tensor, which the file gives the module's name.
                    alone = key == "lora_magnitude_vector"
                    yield from ((its, short, stem[:-1] if alone else filed_as) for its, short, filed_as in named)
        else:
            yield from _walk(child, f"{real}{key}.", f"{bare}{key}.", f"{filed}{key}.")
