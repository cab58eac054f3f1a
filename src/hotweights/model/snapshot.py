"""Snapshot: the attributes of a model and their containers, to be put back. Values of tensors are not kept."""

from __future__ import annotations

import operator
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from .walk import LEAVES, MODULE_PRIVATE

_DEPTH = 8  # More than a walk for tensors goes, so whatever that finds is put back.
_CONTAINERS = (dict, list, set)
_OPAQUE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_NO_CONTAINERS = LEAVES | {torch.Tensor, nn.Parameter}  # found out faster than by isinstance


class Change(NamedTuple):
    """One thing that was not as before.

    Attributes:
        where: the path of the attribute or container.
        of_state: whether it is a parameter, a buffer or a module of a module.
        now: what is there now.
    """

    where: str
    of_state: bool
    now: object


class Snapshot:
    """What every module and parameter of ``model`` held when this was made: attributes, and the containers in them."""

    def __init__(self, model: nn.Module) -> None:
        self._held: list[tuple[str, Any, Any]] = []  # where, the container itself, a shallow copy of it
        self._empty: list[tuple[str, Any, Any]] = []  # where, under which key, the container: by far the most
        self._seen: set[int] = set()
        self._state: set[int] = set()  # the dictionaries that make up the state
        self._classes: list[tuple[str, Any, type]] = []
        self._grads: list[tuple[str, torch.Tensor, bool, torch.Tensor | None]] = []
        # Each is held for itself: one that attributes lead to may lie deeper than a walk from there would go.
        self._modules = [*model.named_modules()]
        self._known = {id(module) for _, module in self._modules}
        for prefix, module in self._modules:  # It grows meanwhile.
            self._hold_module(prefix, module, prefix or type(model).__name__)

    def _hold_module(self, prefix: str, module: nn.Module, where: str) -> None:
        self._classes.append((where, module, type(module)))
        self._state |= {id(module._parameters), id(module._buffers), id(module._modules)}
        self._hold(where, module.__dict__, 0)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                name = f"{prefix}.{key}" if prefix else key
                self._classes.append((name, tensor, type(tensor)))
                self._grads.append((name, tensor, tensor.requires_grad, tensor.grad if tensor.is_leaf else None))
                self._hold(name, tensor.__dict__, 0)

    def _hold(self, where: str, container: Any, depth: int) -> None:
        if id(container) in self._seen or depth > _DEPTH:
            return
        self._seen.add(id(container))
        self._held.append((where, container, container.copy()))
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, item in items:
            if type(item) in _NO_CONTAINERS or isinstance(item, _OPAQUE):
                continue
            if isinstance(item, nn.Module):
                if id(item) not in self._known:
                    self._known.add(id(item))
                    self._modules.append((_within(where, key), item))
                continue
            if not isinstance(item, _CONTAINERS):
                item = getattr(item, "__dict__", None)  # an object's attributes are a container too
                if type(item) is not dict:
                    continue
            if item:
                self._hold(_within(where, key), item, depth + 1)
            else:
                self._empty.append((where, key, item))

    def put_back(self) -> list[Change]:
        """Undo every change since; returns where there was one."""
        changes: list[Change] = []
        for where, owner, kind in self._classes:
            if type(owner) is not kind:
                changes.append(Change(f"{where}.__class__", True, type(owner)))
                owner.__class__ = kind
        for where, container, before in self._held:
            changes += self._put_back(where, container, before)
        for where, key, container in [row for row in self._empty if row[2]]:
            changes += self._put_back(_within(where, key), container, {} if isinstance(container, dict) else ())
        for where, tensor, requires_grad, grad in self._grads:
            if tensor.requires_grad != requires_grad:
                changes.append(Change(f"{where}.requires_grad", True, tensor.requires_grad))
                tensor.requires_grad_(requires_grad)
            if tensor.is_leaf and tensor.grad is not grad:
                changes.append(Change(f"{where}.grad", True, tensor.grad))
                tensor.grad = grad
        return changes

    def _put_back(self, where: str, container: Any, before: Any) -> list[Change]:
        of_state = id(container) in self._state
        return [Change(path, of_state, now) for path, now in _undone(where, container, before)]


def _within(where: str, key: Any) -> str:
    return where if key in MODULE_PRIVATE else f"{where}.{key}"


def _undone(where: str, container: Any, before: Any) -> Iterator[tuple[str, object]]:
    if _unchanged(container, before):
        return
    if isinstance(container, dict):
        keys = [key for key in {**before, **container} if container.get(key, _UNDONE) is not before.get(key, _UNDONE)]
        if keys or list(container) != list(before):
            yield from [(f"{where}.{key}", container.get(key)) for key in keys]
            container.clear()
            container.update(before)
    # A set's copy may be in another order.
    elif not isinstance(container, set) or {*map(id, container)} != {*map(id, before)}:
        yield where, list(container)
        container.clear()
        container.extend(before) if isinstance(container, list) else container.update(before)


def _unchanged(container: Any, before: Any) -> bool:
    """Whether it surely holds the same objects in the same order. Nearly all do, and this is fast."""
    if len(container) != len(before) or not all(map(operator.is_, container, before)):
        return False
    return not isinstance(container, dict) or all(map(operator.is_, container.values(), before.values()))


_UNDONE = object()
