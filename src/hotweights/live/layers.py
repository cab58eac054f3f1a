"""Layers: modules with tensors, in checkpoint and in kernel format. It swaps what modules hold; it copies no bytes.

The *checkpoint format* of a layer is what it holds before it is processed for the first time: classes, shapes, strides,
dtypes and attributes of its tensors, and its own attributes. It is kept as twins on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from ..errors import HotweightsError
from ..modules import dressed
from .spans import has_bytes

__all__ = ["Contents", "Difference", "Layer", "contents", "differences", "layers_of", "put"]

_PRIVATE = frozenset(nn.Module().__dict__)


class Contents(NamedTuple):
    """What a module holds, as objects; its children are not among them."""

    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, torch.Tensor | None]
    transient: set[str]
    attributes: dict[str, object]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that is a parameter, a buffer or an attribute, by key."""
        for store in (self.parameters, self.buffers, self.attributes):
            for key, value in store.items():
                if isinstance(value, torch.Tensor):
                    yield key, value

    def replaced(self, made: Mapping[str, torch.Tensor]) -> Contents:
        """The same with other tensors, by key."""
        stores = (self.parameters, self.buffers, self.attributes)
        parameters, buffers, attributes = ({key: made.get(key, one) for key, one in store.items()} for store in stores)
        return Contents(parameters, buffers, set(self.transient), attributes)  # type: ignore[arg-type]


def contents(module: nn.Module) -> Contents:
    """What ``module`` holds now."""
    return Contents(
        dict(module._parameters),
        dict(module._buffers),
        set(module._non_persistent_buffers_set),
        {key: value for key, value in module.__dict__.items() if key not in _PRIVATE},
    )


def put(module: nn.Module, held: Contents) -> None:
    """Make ``module`` hold this, and nothing else."""
    for store, wanted in ((module._parameters, held.parameters), (module._buffers, held.buffers)):
        store.clear()
        store.update(wanted)  # type: ignore[arg-type]
    module._non_persistent_buffers_set.clear()
    module._non_persistent_buffers_set.update(held.transient)
    for key in [key for key in module.__dict__ if key not in _PRIVATE and key not in held.attributes]:
        del module.__dict__[key]
    module.__dict__.update(held.attributes)


class Layer:
    """One module of a live model that is processed, and its checkpoint format.

    Attributes:
        name: qualified; empty for the model itself.
        module: the module.
        deferred: whether it is processed after all others.
    """

    def __init__(self, name: str, module: nn.Module, *, deferred: bool) -> None:
        self.name = name
        self.module = module
        self.deferred = deferred
        held = contents(module)
        self._format = held.replaced({key: _twin(tensor) for key, tensor in held.tensors() if has_bytes(tensor)})

    def full(self, key: str) -> str:
        """The qualified name of one of its tensors."""
        return f"{self.name}.{key}" if self.name else key

    def tensors(self) -> dict[str, torch.Tensor]:
        """What it holds now, by qualified name."""
        return {self.full(key): tensor for key, tensor in contents(self.module).tensors()}

    def captured(self) -> dict[str, torch.Tensor]:
        """The twins of its checkpoint format, by qualified name."""
        return {self.full(key): twin for key, twin in self._format.tensors() if twin.is_meta}

    def open(self, scratch: Callable[[str], torch.Tensor]) -> None:
        """Put it into checkpoint format. ``scratch(name)`` gives the memory of each tensor, in that format's shape."""
        made = {key: dressed(scratch(self.full(key)), twin) for key, twin in self._format.tensors() if twin.is_meta}
        put(self.module, self._format.replaced(made))

    def show_twins(self) -> None:
        """Put it into checkpoint format without memory: for loading code that is traced."""
        put(self.module, self._format)

    def differs(self, held: Contents) -> bool:
        """Whether ``held`` is of another format than the checkpoint's: then only twins can be traced."""
        found = dict(held.tensors())
        ours = {key: twin for key, twin in self._format.tensors() if twin.is_meta}
        return any(key not in found or _facts(found[key]) != _facts(twin) for key, twin in ours.items())


def _facts(tensor: torch.Tensor) -> tuple[object, ...]:
    if nn.parameter.is_lazy(tensor) or tensor.layout is not torch.strided:
        return (type(tensor), tensor.dtype)
    return type(tensor), tensor.dtype, tensor.shape, tensor.stride(), sorted(tensor.__dict__)


def _twin(tensor: torch.Tensor) -> torch.Tensor:
    bare = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta")
    return dressed(bare, tensor)


class Difference(NamedTuple):
    """What processing made new: values for live tensors, and objects for attributes.

    Attributes:
        values: pairs of a live tensor's qualified name and its new value.
        attributes: the layer's own attributes that are no tensors, as they shall be.
    """

    values: list[tuple[str, torch.Tensor]]
    attributes: dict[str, object]


def differences(layer: Layer, live: Contents, made: Contents) -> Difference:
    """How ``made`` by processing differs from what is live.

    Raises:
        HotweightsError: a live tensor would have to change its shape or dtype, or to come or go.
    """
    old, new = dict(live.tensors()), dict(made.tensors())
    problems = [f"{layer.full(key)}: is gone after processing" for key in old.keys() - new.keys()]
    problems += [
        f"{layer.full(key)}: was made by processing, but not the first time" for key in new.keys() - old.keys()
    ]
    for key in old.keys() & new.keys():
        if (old[key].dtype, old[key].shape) != (new[key].dtype, new[key].shape):
            problems.append(
                f"{layer.full(key)}: {old[key].dtype} {list(old[key].shape)} is live, processing made "
                f"{new[key].dtype} {list(new[key].shape)}"
            )
    if problems:
        raise HotweightsError("; ".join(sorted(problems)))
    values = [(layer.full(key), tensor) for key, tensor in new.items() if tensor is not old[key]]
    plain = {key: value for key, value in made.attributes.items() if not isinstance(value, torch.Tensor)}
    return Difference(values, plain)


def layers_of(model: nn.Module, chosen: Callable[[str, nn.Module], bool]) -> Iterator[tuple[str, nn.Module]]:
    """The modules for which ``chosen`` holds, each once, by their first names."""
    for name, module in model.named_modules():
        if chosen(name, module):
            yield name, module
