"""Holders: containers and objects that a layer's attributes lead to, and what they hold. It follows no module.

What a holder holds is its *state*, a dict: attributes of an object, items of a dict, a list (by number) or a set.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .wrappers import attributes_of, leaves, rebuilt

__all__ = [
    "ABSENT",
    "Held",
    "amend",
    "assign",
    "by_name",
    "exchanged",
    "held_by",
    "hides_memory",
    "is_opaque",
    "remade",
    "state_of",
    "step",
    "tensors_in",
]

ABSENT: Any = object()
"""In changes of a state: that it holds the key no more."""

_DEPTH = 6
_PRIVATE = frozenset(nn.Module().__dict__)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, enum.Enum, types.ModuleType, range, slice)
_TORCH = (torch.dtype, torch.device, torch.layout, torch.Size, torch.memory_format)
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, partial)
_FOREIGN = {"torch", "logging", "threading", "multiprocessing", "concurrent", "asyncio", "weakref"}


class Held(NamedTuple):
    """A holder and what it holds, as it was when this was made."""

    holder: object
    state: dict[Any, object]


def held_by(attributes: Mapping[str, object], parts: Mapping[str, nn.Module] | None = None) -> dict[str, Held]:
    """Every holder that attributes lead to, by its path; one that several lead to has the first of them in order.

    ``parts`` are modules that are holders like any other.
    """
    found: dict[str, Held] = {}
    seen: set[int] = set()
    for path, part in (parts or {}).items():
        seen.add(id(part))
        found[path] = Held(part, state_of(part))
        for key, one in found[path].state.items():
            _walk(step(path, part, key), one, found, seen, 1)
    for key in sorted(attributes):
        _walk(key, attributes[key], found, seen, 0)
    return found


def _walk(path: str, value: object, found: dict[str, Held], seen: set[int], depth: int) -> None:
    if type(value) in _LEAVES or id(value) in seen or depth > _DEPTH or not _is_holder(value):
        return
    seen.add(id(value))
    state = state_of(value)
    found[path] = Held(value, state)
    for key, one in state.items():
        _walk(step(path, value, key), one, found, seen, depth + 1)


_LEAVES = {*_PLAIN, *_TORCH, torch.Tensor, nn.Parameter, types.FunctionType, types.MethodType}


def _is_holder(value: object) -> bool:
    if isinstance(value, (*_PLAIN, *_TORCH, *_CODE, nn.Module, torch.Tensor)):
        return False
    if isinstance(value, (dict, list, set, tuple)):
        return True
    if hasattr(type(value), "__del__"):  # It owns something: two objects with one state would free that twice.
        return False
    return type(getattr(value, "__dict__", None)) is dict and type(value).__module__.split(".")[0] not in _FOREIGN


def is_opaque(value: object) -> bool:
    """Whether it may hold memory that nobody sees: code with what it closes over, objects without attributes."""
    return not isinstance(value, (*_PLAIN, *_TORCH, nn.Module, torch.Tensor)) and not _is_holder(value)


def hides_memory(value: object, depth: int = 0) -> bool:
    """Whether it may hold addresses of memory that it does not own, where nobody sees them."""
    if isinstance(value, (*_PLAIN, *_TORCH, nn.Module, torch.Tensor, types.BuiltinFunctionType)):
        return False
    if depth > _DEPTH:
        return True
    if isinstance(value, types.FunctionType):
        inside: list[object] = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
    elif isinstance(value, partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.MethodType):
        inside = [value.__self__]
    elif _is_holder(value):
        inside = list(state_of(value).values())
    else:
        return True
    return any(hides_memory(one, depth + 1) for one in inside)


def step(path: str, holder: object, key: object) -> str:
    """The path of what a holder holds, as code would write it."""
    return f"{path}[{key!r}]" if isinstance(holder, (dict, list, set, tuple)) else f"{path}.{key}"


def state_of(holder: Any) -> dict[Any, object]:
    """What it holds now. Of modules and tensors: attributes that are their own, not torch's."""
    if isinstance(holder, nn.Module):
        return {key: value for key, value in holder.__dict__.items() if key not in _PRIVATE}
    if isinstance(holder, torch.Tensor):
        return attributes_of(holder)
    if isinstance(holder, dict):
        return dict(holder)
    if isinstance(holder, (list, tuple)):
        return dict(enumerate(holder))
    return {one: one for one in holder} if isinstance(holder, set) else dict(vars(holder))


def assign(holder: Any, wanted: Mapping[Any, object]) -> None:
    """Make it hold this, and nothing else. A tuple is what it is."""
    now = state_of(holder)
    if isinstance(holder, tuple) or (now.keys() == wanted.keys() and all(now[key] is wanted[key] for key in now)):
        return
    if isinstance(holder, list):
        holder[:] = [wanted[number] for number in sorted(wanted)]
    elif isinstance(holder, set):
        holder.clear()
        holder.update(wanted)
    else:
        store = holder if isinstance(holder, dict) else holder.__dict__
        for key in now.keys() - wanted.keys():
            del store[key]
        store.update(wanted)


def amend(holder: object, changes: Mapping[Any, object]) -> None:
    """Change a part of what it holds."""
    wanted = {**state_of(holder), **changes}
    assign(holder, {key: value for key, value in wanted.items() if value is not ABSENT})


def tensors_in(held: Mapping[str, Held]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that holders hold, by path."""
    for path, (holder, state) in held.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                yield from leaves(step(path, holder, key), value)


Exchange = Callable[[str, torch.Tensor], torch.Tensor]


def exchanged(path: str, value: object, exchange: Exchange) -> object:
    """A value with other tensors: of a tuple a new one, if need be; other holders are as they are."""
    if isinstance(value, torch.Tensor):
        return exchange(path, value)
    if not isinstance(value, tuple) or isinstance(value, torch.Size):
        return value
    items = [exchanged(step(path, value, number), one, exchange) for number, one in enumerate(value)]
    if all(new is old for new, old in zip(items, value, strict=True)):
        return value
    return remade(value, items)


def remade(like: tuple[object, ...], items: list[object]) -> tuple[object, ...]:
    """A tuple of the same class; named ones take their items one by one."""
    make: Callable[..., tuple[object, ...]] = type(like)
    return make(*items) if hasattr(like, "_fields") else make(items)


def by_name(made: Mapping[str, torch.Tensor]) -> Exchange:
    """Exchanges tensors for those that were made for their paths."""
    return lambda path, tensor: rebuilt(path, tensor, made)
