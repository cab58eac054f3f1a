"""Anchors: every tensor that can be reached from a model, by a path that leads to it. It looks, and changes nothing."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn


def reachable(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that can be reached from ``model``, by a path that leads to it: state first, then attributes.

    Where several share memory the first one names it, so buffers that are no state come after those that they view.
    """
    parameters: dict[str, torch.Tensor] = {}
    buffers: dict[str, torch.Tensor] = {}
    others: dict[str, torch.Tensor] = {}
    modules = list(model.named_modules(remove_duplicate=False))
    for prefix, module in modules:
        dot = f"{prefix}." if prefix else ""
        parameters.update({dot + key: one for key, one in module._parameters.items() if one is not None})
        for key, one in module._buffers.items():
            if one is not None:
                (others if key in module._non_persistent_buffers_set else buffers)[dot + key] = one
    found = {**parameters, **buffers, **others}
    seen = {id(tensor) for tensor in found.values()}
    for prefix, module in modules:
        if id(module) in seen:
            continue
        seen.add(id(module))
        dot = f"{prefix}." if prefix else ""
        for key, value in module.__dict__.items():
            if key not in _MODULE_PRIVATE and type(value) not in _NO_TENSORS:
                _reach(dot + key, value, found, seen, 0)
    return found


_MODULE_PRIVATE = set(nn.Module().__dict__)
_NO_TENSORS = {bool, int, float, str, type(None), torch.dtype, torch.device}
_DEPTH = 6


def _reach(path: str, value: object, found: dict[str, torch.Tensor], seen: set[int], depth: int) -> None:
    if isinstance(value, (str, int, float, bool, type(None), type, types.ModuleType)) or depth > _DEPTH:
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        found[path] = value
        return
    for step, item in _steps(value):
        _reach(path + step, item, found, seen, depth + 1)


def _steps(value: Any) -> Iterator[tuple[str, object]]:
    """What one step leads to, and how the step is written."""
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{number}]", item) for number, item in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, types.FunctionType):
        for number, cell in enumerate(value.__closure__ or ()):
            with suppress(ValueError):  # an empty cell
                yield f".__closure__[{number}]", cell.cell_contents
    elif isinstance(value, nn.Module):
        yield from ((f".{key}", item) for key, item in (*value._parameters.items(), *value._buffers.items()))
        yield from ((f".{key}", item) for key, item in value._modules.items())
        yield from ((f".{key}", item) for key, item in vars(value).items() if key not in _MODULE_PRIVATE)
    elif type(getattr(value, "__dict__", None)) is dict:
        yield from ((f".{key}", item) for key, item in vars(value).items())
