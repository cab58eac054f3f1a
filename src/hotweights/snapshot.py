"""Snapshot: the attributes of a model and their containers, to be put back. It copies no tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["Snapshot"]

_DEPTH = 8
_CONTAINERS = (dict, list, set)


class Snapshot:
    """What every module and parameter of ``model`` held when this was made: attributes, and the containers in them."""

    def __init__(self, model: nn.Module) -> None:
        self._held: list[tuple[str, Any, Any]] = []  # where, the container itself, a shallow copy of it
        self._seen: set[int] = set()
        self.tensors: dict[str, torch.Tensor] = {}
        """Parameters and buffers by name."""
        for prefix, module in model.named_modules():
            self._hold(prefix or type(model).__name__, module.__dict__, 0)
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    name = f"{prefix}.{key}" if prefix else key
                    self.tensors[name] = tensor
                    self._hold(name, tensor.__dict__, 0)

    def _hold(self, where: str, container: Any, depth: int) -> None:
        if id(container) in self._seen or depth > _DEPTH:
            return
        self._seen.add(id(container))
        self._held.append((where, container, container.copy()))
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, item in items:
            if isinstance(item, _CONTAINERS):
                self._hold(where if key in _PRIVATE else f"{where}.{key}", item, depth + 1)

    def put_back(self) -> list[str]:
        """Undo every change since; returns where there was one, in words."""
        return [change for where, container, before in self._held for change in _undone(where, container, before)]


_PRIVATE = set(nn.Module().__dict__)


def _undone(where: str, container: Any, before: Any) -> Iterator[str]:
    if isinstance(container, dict):
        keys = [key for key in {**before, **container} if container.get(key, _UNDONE) is not before.get(key, _UNDONE)]
        if keys or list(container) != list(before):
            yield from (f"{where}.{key}" for key in keys)
            container.clear()
            container.update(before)
    elif len(container) != len(before) or any(a is not b for a, b in zip(container, before, strict=True)):
        yield where
        container.clear()
        container.extend(before) if isinstance(container, list) else container.update(before)


_UNDONE = object()
