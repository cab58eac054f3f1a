"""Reachable tensors: every tensor that a path of attributes and containers leads to from a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from .walk import LEAVES, MODULE_PRIVATE, modules_of, walk


def reachable(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that can be reached from ``model``, by a path that leads to it: state first, then attributes.

    Where several share memory the first one names it, so buffers that are no state come after those that they view.
    """
    parameters: dict[str, torch.Tensor] = {}
    buffers: dict[str, torch.Tensor] = {}
    transient: dict[str, torch.Tensor] = {}
    modules = list(modules_of(model))
    for prefix, module in modules:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                parameters[prefix + key] = parameter
        for key, buffer in module._buffers.items():
            if buffer is not None:
                (transient if key in module._non_persistent_buffers_set else buffers)[prefix + key] = buffer
    tensors = {**parameters, **buffers, **transient}
    tensors.update(attributes(modules, {id(tensor) for tensor in tensors.values()}))
    return tensors


def attributes(modules: Iterable[tuple[str, nn.Module]], seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that attributes of these modules lead to, by path, but those whose ids are in ``seen``."""
    each: dict[nn.Module, str] = {}
    for prefix, module in modules:
        each.setdefault(module, prefix)
    seen |= set(map(id, each))  # A walk that came to one of them from elsewhere might end within it.
    for module, prefix in each.items():
        inside = module.__dict__
        for key in inside if len(inside) > len(MODULE_PRIVATE) else ():
            value = inside[key]
            if key not in MODULE_PRIVATE and type(value) not in LEAVES:  # Here: a generator for each costs more.
                for path, item in walk(prefix + key, value, seen):
                    if isinstance(item, torch.Tensor):
                        yield path, item
