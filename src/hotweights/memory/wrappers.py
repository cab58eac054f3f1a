"""Wrappers: tensors whose bytes lie in other tensors inside them, found through ``__tensor_flatten__``.

Also, in words, every other kind of tensor that shows no plain bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..shell import Shell, described


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether its bytes lie in other tensors, inside it."""
    return type(tensor) not in _BARE and not nn.parameter.is_lazy(tensor) and is_traceable_wrapper_subclass(tensor)


_BARE = {torch.Tensor, nn.Parameter, nn.Buffer}
_NO_DISPATCH = torch._C._disabled_torch_dispatch_impl
_OURS = __name__.partition(".")[0]


def hidden(tensor: torch.Tensor) -> str | None:
    """What it is, and what to give in its place, if its values are no plain bytes; ``None`` if they are."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "inside vmap or grad, where it stands for others; give what it was made of"
    if tensor.is_nested:
        return "a nested tensor; give what its unbind() gives, by names of their own"
    if tensor.layout is not torch.strided:
        return f"{tensor.layout}; give its to_dense()"
    if tensor.is_quantized:
        return f"quantised ({tensor.dtype}); give its dequantize()"
    kind = type(tensor)
    if kind in _BARE or kind.__torch_dispatch__ is _NO_DISPATCH or kind.__module__.startswith(f"{_OURS}."):
        return None  # Guards and fake weights of ours see themselves what is done with them.
    if kind.__name__ in _CURES:
        return f"a {kind.__name__}, {_CURES[kind.__name__]}"
    own = kind.dequantize is not torch.Tensor.dequantize
    way = "its dequantize()" if own else "a plain tensor of its values"
    return f"a {kind.__name__}, whose bytes lie in other tensors; give {way}"


_CURES = {
    "FakeTensor": "which has no values; give real tensors",
    "MaskedTensor": "a part of which is masked; give its get_data()",
}


def leaves(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensor by its name; of a wrapper also the tensors inside, to any depth, by names like ``weight.scale``."""
    yield name, tensor
    if is_wrapper(tensor):
        for key in _keys(tensor):
            yield from leaves(f"{name}.{key}", getattr(tensor, key))


def inside(name: str, tensor: torch.Tensor) -> dict[str, tuple[torch.Tensor, Shell]]:
    """The tensors with plain bytes that a wrapper is made of, by names like ``weight.scale``, and the wrapper's traits.

    Nothing where it is no wrapper, or where a tensor inside it has no plain bytes.
    """
    if not is_wrapper(tensor) or tensor.is_nested:
        return {}
    every = list(leaves("", tensor))
    wrappers = [(key, part) for key, part in every if is_wrapper(part)]
    parts = {key[1:]: part for key, part in every if not is_wrapper(part)}
    if any(hidden(part) for part in parts.values()):
        return {}
    traits = tuple(trait for key, wrapper in wrappers for trait in _traits(key[1:], wrapper))
    kind, shape = type(tensor), tuple(tensor.shape)
    return {
        f"{name}.{key}": (part, Shell(key, f"{kind.__module__}.{kind.__qualname__}", tensor.dtype, shape, traits))
        for key, part in parts.items()
    }


def _traits(key: str, wrapper: torch.Tensor) -> Iterator[tuple[str, str]]:
    """What a wrapper is, by names that begin with the ``key`` of one inside another."""
    stem = f"{key}." if key else ""
    if key:
        yield f"{stem}class", described(type(wrapper))
        yield f"{stem}dtype", described(wrapper.dtype)
        yield f"{stem}shape", described(wrapper.shape)
    keys, rest = wrapper.__tensor_flatten__()  # type: ignore[attr-defined]
    yield f"{stem}tensors", ", ".join(keys)
    for trait, value in rest.items() if type(rest) is dict else [("context", rest)]:
        yield f"{stem}{trait}", described(value)


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
    keys, rest = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    new = {key: new.get(key, getattr(tensor, key)) for key in keys}
    bare = type(tensor).__tensor_unflatten__(new, rest, tensor.size(), tensor.stride())  # type: ignore[attr-defined]
    like = nn.Parameter(bare, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
    like.__dict__.update(attributes_of(tensor))
    return like


def _keys(tensor: torch.Tensor) -> list[str]:
    keys, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [key for key in keys if isinstance(getattr(tensor, key), torch.Tensor)]  # A DTensor names its mesh too.
