"""``memory_of``: the tensors that a component's loading code may write, found by what it refers to."""

from __future__ import annotations

import types
from collections.abc import Iterator

import torch
from torch import nn

from ..model.reachable import reachable
from ..model.walk import walk
from .component import Component


def memory_of(component: Component) -> Iterator[torch.Tensor]:
    """The tensors of every module that the component's code is, is bound to, closes over or names."""
    seen: set[int] = set()
    known: set[int] = set()
    values: list[object] = [component.load_weights]
    while values:
        for _, value in walk("", values.pop(), seen):
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, nn.Module) and id(value) not in known:
                known.update(map(id, value.modules()))
                yield from reachable(value).values()
            elif isinstance(value, types.FunctionType):
                inside = value.__globals__
                values += [inside[name] for name in value.__code__.co_names if name in inside]
