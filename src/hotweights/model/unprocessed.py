"""Unprocessed: layers that engines process after loading, where nobody does: their kernels read wrong weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .walk import modules_of

_WORD = "process_weights_after_loading"


def unprocessed(model: nn.Module, processed: Callable[[str, nn.Module], bool] | None = None) -> list[str]:
    """Names of the layers that have a ``process_weights_after_loading``, or whose ``quant_method`` has.

    Args:
        model: is looked at.
        processed: whether somebody processes a layer, given with one of its names; ``None`` where nobody does.
    """
    left: dict[nn.Module, str] = {}
    done: set[nn.Module] = set()
    own: dict[type, bool] = {}  # Asking each module would take as long as all else here.
    for prefix, module in modules_of(model):
        kind = type(module)
        if kind not in own:
            own[kind] = hasattr(kind, _WORD)
        own_modules = module.__dict__.get("_modules")  # A part made by TorchScript has no dictionary there.
        method = module.__dict__.get("quant_method")
        if method is None and isinstance(own_modules, dict):
            method = own_modules.get("quant_method")
        if not (own[kind] or hasattr(method, _WORD)):
            continue
        if processed is not None and processed(prefix[:-1], module):
            done.add(module)
        left.setdefault(module, prefix[:-1] or kind.__name__)
    return [name for module, name in left.items() if module not in done]
