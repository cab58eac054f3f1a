"""Holders: the containers and objects that a layer's attributes lead to, and what they hold.

A holder is a dict, list, set, tuple or plain object. Its *state* is a dict of what it holds: attributes of an object,
items of a dict, a list (by number) or a set. Modules of the model are not followed; a module that processing made, and
that the model does not register, is an object like others.
"""

from __future__ import annotations

import enum
import types
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..memory.wrappers import attributes_of, leaves, rebuilt

ABSENT: Any = object()
"""Stands for a key that a holder no longer has, where changes of its state are told."""

_DEPTH = 6
_STORES = ("_parameters", "_buffers", "_non_persistent_buffers_set")
# Of what torch keeps in a module, processing changes the children and the hooks of a forward pass. `training` is the
# caller's: put back with the rest, a model would leave eval mode.
_PRIVATE = set(nn.Module().__dict__) - {
    "_modules",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
}
_CLASS = "__class__"
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, enum.Enum, types.ModuleType, range, slice)
_TORCH = (torch.dtype, torch.device, torch.layout, torch.Size, torch.memory_format)
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, partial)
_FOREIGN = {"torch", "logging", "threading", "multiprocessing", "concurrent", "asyncio", "weakref"}


class Held(NamedTuple):
    """A holder and what it holds, as it was when this was made."""

    holder: object
    state: dict[Any, object]


def held_by(
    attributes: Mapping[str, object], own: Container[int] | None = None, parts: Mapping[str, nn.Module] | None = None
) -> dict[str, Held]:
    """Every holder that attributes lead to, by its path. Where several lead to one, it has the first path in order.

    Args:
        attributes: of a module, by name.
        own: ids of the model's modules, which are not followed. Without it no module is followed.
        parts: modules that are followed all the same, by path: a ``quant_method`` that is a child.
    """
    walk = _Walk(own)
    for path, part in (parts or {}).items():
        walk.part(path, part)
    for key in sorted(attributes):
        walk.on(key, attributes[key], 0)
    return walk.holders


class _Walk:
    def __init__(self, own: Container[int] | None) -> None:
        self.holders: dict[str, Held] = {}
        self._seen: set[int] = set()
        self._own = own

    def on(self, path: str, value: object, depth: int) -> None:
        kind = type(value)  # Asked first, for every module has many containers and most of them are empty.
        if kind in _LEAVES or id(value) in self._seen or depth > _DEPTH:
            return
        is_module = kind not in _CONTAINERS and isinstance(value, nn.Module)
        if kind not in _CONTAINERS and not (self._is_foreign(value) if is_module else _is_holder(value)):
            return
        self._seen.add(id(value))
        state = state_of(value)
        self.holders[path] = Held(value, state)
        inside = state if not is_module else state | {key: value.__dict__[key] for key in _STORES}
        for key, item in inside.items():
            self.on(step(path, value, key), item, depth if is_module else depth + 1)

    def part(self, path: str, module: nn.Module) -> None:
        self._seen.add(id(module))
        state = state_of(module)
        self.holders[path] = Held(module, state)
        for key, value in state.items():
            self.on(step(path, module, key), value, 1)

    def _is_foreign(self, module: object) -> bool:
        return self._own is not None and id(module) not in self._own


_CONTAINERS = {dict, OrderedDict, list, set, tuple}
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
    """Whether tensors in it cannot be seen: it is code that closes over them, or an object without attributes."""
    return not isinstance(value, (*_PLAIN, *_TORCH, nn.Module, torch.Tensor)) and not _is_holder(value)


def hides_memory(value: object, depth: int = 0) -> bool:
    """Whether it may hold addresses of other memory, where nobody sees them: a packed handle, a closure over one."""
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
    return any(hides_memory(value, depth + 1) for value in inside)


def step(path: str, holder: object, key: object) -> str:
    """The path of what a holder holds under ``key``, written as Python would write it."""
    return f"{path}[{key!r}]" if isinstance(holder, (dict, list, set, tuple)) else f"{path}.{key}"


def state_of(holder: Any) -> dict[Any, object]:
    """What a holder, module or tensor holds now.

    Of a module: its class and attributes, without the stores of parameters and buffers. Of a tensor: its attributes.
    """
    if type(holder) in _CONTAINERS and not holder:
        return {}
    if isinstance(holder, nn.Module):
        return {_CLASS: type(holder)} | {key: value for key, value in holder.__dict__.items() if key not in _PRIVATE}
    if isinstance(holder, torch.Tensor):
        return attributes_of(holder)
    if isinstance(holder, dict):
        return dict(holder)
    if isinstance(holder, (list, tuple)):
        return dict(enumerate(holder))
    return {item: item for item in holder} if isinstance(holder, set) else dict(vars(holder))


def assign(holder: Any, wanted: Mapping[Any, object]) -> None:
    """Make a holder hold ``wanted`` and nothing else. A tuple cannot be changed, and is left as it is."""
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
        if not isinstance(holder, nn.Module):
            store.update(wanted)
            return
        store.update((key, value) for key, value in wanted.items() if key != _CLASS)
        if type(holder) is not wanted[_CLASS]:
            holder.__class__ = wanted[_CLASS]  # type: ignore[assignment]


def amend(holder: object, changes: Mapping[Any, object]) -> None:
    """Change some of what a holder holds; ``ABSENT`` takes a key away."""
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
    """The value with its tensors exchanged: a tensor, or a tuple, which is made anew. Other holders are left alone."""
    if isinstance(value, torch.Tensor):
        return exchange(path, value)
    if not isinstance(value, tuple) or isinstance(value, torch.Size):
        return value
    items = [exchanged(step(path, value, number), item, exchange) for number, item in enumerate(value)]
    if all(new is old for new, old in zip(items, value, strict=True)):
        return value
    return remade(value, items)


def remade(like: tuple[object, ...], items: list[object]) -> tuple[object, ...]:
    """A tuple of the same class with other items. Named tuples take their items as arguments."""
    make: Callable[..., tuple[object, ...]] = type(like)
    return make(*items) if hasattr(like, "_fields") else make(items)


def by_name(made: Mapping[str, torch.Tensor]) -> Exchange:
    """Exchanges tensors for those that were made for their paths."""
    return lambda path, tensor: rebuilt(path, tensor, made)
