"""Walk: from a model to its modules, and from any object to those that it leads to. It changes nothing.

The lists of what torch keeps in a module and of types that hold no tensor are here for every walk in the package.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

MODULE_PRIVATE = frozenset(nn.Module().__dict__)
"""Names of the attributes that torch keeps in every module."""

LEAVES: frozenset[type] = frozenset(
    (
        *(type(None), bool, int, float, complex, str, bytes, range, slice),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
    )
)
"""Types whose instances lead to no tensor. Of subclasses that is not known: ask for ``type(value)``."""

DEPTH = 6
"""So many steps from a module a walk goes. Those from a module to its parts and attributes do not count."""

_ENDS = (str, int, float, type, types.ModuleType, torch.Tensor)


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module, once for each name it has, in the order of the state dict.

    The name is the prefix of its tensors' names: empty, or with a dot at the end.
    """
    stack = [("", model)]
    while stack:  # named_modules() gives the same in four times the time, and every load comes here.
        prefix, module = stack.pop()
        yield prefix, module
        if module._modules:
            children = [(f"{prefix}{key}.", child) for key, child in module._modules.items() if child is not None]
            stack += reversed(children)


def walk(path: str, value: object, seen: set[int], depth: int = 0) -> Iterator[tuple[str, object]]:
    """``value`` and every object that it leads to, by a path as code would write it; those within tensors excepted.

    Objects whose ids are in ``seen`` are left out; those that are met are added to it.
    """
    if type(value) in LEAVES or depth > DEPTH or id(value) in seen:
        return
    seen.add(id(value))
    yield path, value
    if not isinstance(value, _ENDS):
        further = depth if isinstance(value, nn.Module) else depth + 1
        for step, item in _steps(value):
            yield from walk(path + step, item, seen, further)


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
        yield from ((f".{key}", item) for key, item in vars(value).items() if key not in MODULE_PRIVATE)
    elif type(getattr(value, "__dict__", None)) is dict:
        yield from ((f".{key}", item) for key, item in vars(value).items())
