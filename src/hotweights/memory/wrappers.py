"""Wrappers: tensors whose bytes lie in other tensors inside them, found through ``__tensor_flatten__``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether its bytes lie in other tensors, inside it."""
    return type(tensor) not in _BARE and not nn.parameter.is_lazy(tensor) and is_traceable_wrapper_subclass(tensor)


_BARE = {torch.Tensor, nn.Parameter, nn.Buffer}


def leaves(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensor by its name; of a wrapper also the tensors inside, to any depth, by names like ``weight.scale``."""
    yield name, tensor
    if is_wrapper(tensor):
        for key in _keys(tensor):
            yield from leaves(f"{name}.{key}", getattr(tensor, key))


def context(tensor: torch.Tensor) -> object:
    """What a wrapper is besides the tensors inside: their names, and what its class needs to wrap them again."""
    return tensor.__tensor_flatten__() if is_wrapper(tensor) else None  # type: ignore[attr-defined]


def attributes_of(tensor: torch.Tensor) -> dict[str, object]:
    """Its attributes, without the tensors inside a wrapper."""
    inside = _keys(tensor) if is_wrapper(tensor) else ()
    return {key: value for key, value in tensor.__dict__.items() if key not in inside}


def rebuilt(name: str, tensor: torch.Tensor, made: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tensor that was made for this name; or a wrapper like ``tensor`` around those made for the names inside.

    ``tensor`` itself, if nothing was made for it or inside it.
    """
    if name in made or not is_wrapper(tensor):
        return made.get(name, tensor)
    inside = {key: getattr(tensor, key) for key in _keys(tensor)}
    new = {key: rebuilt(f"{name}.{key}", inner, made) for key, inner in inside.items()}
    if all(new[key] is inner for key, inner in inside.items()):
        return tensor
    _, rest = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    bare = type(tensor).__tensor_unflatten__(new, rest, tensor.size(), tensor.stride())  # type: ignore[attr-defined]
    like = nn.Parameter(bare, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
    like.__dict__.update(attributes_of(tensor))
    return like


def _keys(tensor: torch.Tensor) -> list[str]:
    keys, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return list(keys)
