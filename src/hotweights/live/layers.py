"""Layers: modules with tensors, in checkpoint and in kernel format. It swaps what modules hold; it copies no bytes.

The *checkpoint format* of a layer is what it holds before it is processed for the first time: classes, shapes, strides,
dtypes and attributes of its tensors, and its own attributes. It is kept as twins on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from ..errors import HotweightsError
from ..modules import dressed
from .spans import has_bytes

__all__ = [
    "Contents",
    "Dressing",
    "Layer",
    "assign",
    "assigned",
    "contents",
    "differences",
    "layers_of",
    "put",
    "unmoved",
]

_PRIVATE = frozenset(nn.Module().__dict__)
_ABSENT = object()

Dressing = dict[int, torch.Tensor]
"""What was made of each twin while some layers are open: a parameter that two layers hold is one object in both."""


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
        assigned(module),
    )


def put(module: nn.Module, held: Contents) -> None:
    """Make ``module`` hold this, and nothing else."""
    for store, wanted in ((module._parameters, held.parameters), (module._buffers, held.buffers)):
        store.clear()
        store.update(wanted)  # type: ignore[arg-type]
    module._non_persistent_buffers_set.clear()
    module._non_persistent_buffers_set.update(held.transient)
    assign(module, held.attributes)


def assigned(holder: nn.Module | torch.Tensor) -> dict[str, object]:
    """The attributes of a module or a tensor that are its own, not torch's."""
    private = _PRIVATE if isinstance(holder, nn.Module) else ()
    return {key: value for key, value in holder.__dict__.items() if key not in private}


def assign(holder: nn.Module | torch.Tensor, wanted: Mapping[str, object]) -> None:
    """Make these its attributes, and no others."""
    for key in assigned(holder).keys() - wanted.keys():
        del holder.__dict__[key]
    holder.__dict__.update(wanted)


class Layer:
    """One module of a live model that is processed, and its checkpoint format.

    Attributes:
        name: qualified; empty for the model itself.
        names: all names under which the model has the module.
        module: the module.
        deferred: whether it is processed after all others.
        acted: keys of attributes that processing has set, changed or removed at any time.
    """

    def __init__(self, names: Sequence[str], module: nn.Module, *, deferred: bool, twins: Dressing) -> None:
        """``twins`` is what was made for other layers of the model, by the tensors' ids; it is added to."""
        self.name = names[0]
        self.names = tuple(names)
        self.module = module
        self.deferred = deferred
        self.acted: set[str] = set()
        held = contents(module)
        self._twins = {key: _twin(tensor, twins) for key, tensor in held.tensors() if has_bytes(tensor)}
        self._format = held.replaced(self._twins)

    def full(self, key: str) -> str:
        """The qualified name of one of its tensors."""
        return _joined(self.name, key)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What it holds now, by every qualified name."""
        return {_joined(name, key): one for name in self.names for key, one in contents(self.module).tensors()}

    def captured(self) -> dict[str, torch.Tensor]:
        """The twins of its checkpoint format, by every qualified name."""
        return {_joined(name, key): twin for name in self.names for key, twin in self._twins.items()}

    def open(self, scratch: Callable[[str], torch.Tensor], dressing: Dressing, *, anew: bool = False) -> Contents:
        """Put it into checkpoint format, as processing saw it the first time. Returns what it holds then.

        Attributes that processing never touched stay as they are, unless it is made ``anew``.

        Args:
            scratch: gives the memory of each tensor by its qualified name, in that format's shape.
            dressing: what was made for layers that are open too; it is added to.
            anew: whether all its attributes become those of before the first load.
        """
        made = {key: _dressed(scratch, self.full(key), twin, dressing) for key, twin in self._twins.items()}
        held = self._format.replaced(made)
        if not anew:
            now = {key: one for key, one in assigned(self.module).items() if key not in self.acted | made.keys()}
            then = {key: one for key, one in held.attributes.items() if key in self.acted | made.keys()}
            held = held._replace(attributes=now | then)
        put(self.module, held)
        return held

    def processed(self, before: Contents, after: Contents) -> None:
        """Take note of what processing did to its attributes."""
        keys = before.attributes.keys() | after.attributes.keys()
        self.acted |= {
            key for key in keys if before.attributes.get(key, _ABSENT) is not after.attributes.get(key, _ABSENT)
        }

    def free(self) -> set[str]:
        """Keys of tensors in attributes that processing never set: others may set them, a cache for instance."""
        return {key for key, one in assigned(self.module).items() if isinstance(one, torch.Tensor)} - self.acted

    def twin(self, key: str) -> torch.Tensor | None:
        """The twin of one of its tensors."""
        return self._twins.get(key)


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _twin(tensor: torch.Tensor, twins: Dressing) -> torch.Tensor:
    if id(tensor) not in twins:
        bare = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta")
        twins[id(tensor)] = dressed(bare, tensor)
    return twins[id(tensor)]


def _dressed(scratch: Callable[[str], torch.Tensor], name: str, twin: torch.Tensor, dressing: Dressing) -> torch.Tensor:
    if id(twin) not in dressing:
        dressing[id(twin)] = dressed(scratch(name), twin)
    return dressing[id(twin)]


class Difference(NamedTuple):
    """What processing made new: values for live tensors, and attributes of the module and of its live tensors.

    Attributes:
        values: pairs of a live tensor's qualified name and its new value.
        attributes: pairs of a module or live tensor and all its attributes, as they shall be.
    """

    values: list[tuple[str, torch.Tensor]]
    attributes: list[tuple[nn.Module | torch.Tensor, dict[str, object]]]


def differences(
    layer: Layer, live: Contents, made: Contents, known: Container[str], idle: Container[str]
) -> Difference:
    """How ``made`` by processing differs from what is live.

    Args:
        layer: the layer.
        live: what it holds in kernel format.
        made: what processing made.
        known: qualified names of tensors that are live since the first load; others are none of ours.
        idle: qualified names of tensors that neither the update nor processing touches.

    Raises:
        HotweightsError: a live tensor would have to change its shape or dtype, or to come or go.
    """
    old = {key: one for key, one in live.tensors() if layer.full(key) not in idle}
    ours = {key: one for key, one in old.items() if layer.full(key) in known}
    new = {key: one for key, one in made.tensors() if layer.full(key) not in idle}
    new = {key: one for key, one in new.items() if key in ours or one is not old.get(key)}
    problems = [*_changes(layer, ours, new)]
    if problems:
        raise HotweightsError("; ".join(sorted(problems)))
    values = [(layer.full(key), tensor) for key, tensor in new.items() if tensor is not ours[key]]
    own = {key: one for key, one in live.attributes.items() if key not in layer.acted}
    acted = {key: one for key, one in made.attributes.items() if key in layer.acted}
    kept = {key: one for key, one in live.attributes.items() if key in acted and isinstance(one, torch.Tensor)}
    replaced = {id(one): ours[key] for key, one in new.items()}
    acted = {key: replaced.get(id(one), one) for key, one in acted.items()}
    attributes: list[tuple[nn.Module | torch.Tensor, dict[str, object]]] = [(layer.module, own | acted | kept)]
    for key, tensor in new.items():
        if changed := _set_on(tensor, layer.twin(key), ours[key]):
            attributes.append((ours[key], ours[key].__dict__ | changed))
    return Difference(values, attributes)


def _changes(layer: Layer, old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> Iterator[str]:
    yield from (f"{layer.full(key)}: is gone after processing" for key in old.keys() - new.keys())
    for key, tensor in new.items():
        if key not in old:
            yield f"{layer.full(key)}: was made by processing, but not the first time"
        elif _form(old[key]) != _form(tensor):
            yield f"{layer.full(key)}: {_form(old[key])} is live, processing made {_form(tensor)}"


def _form(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype}" if nn.parameter.is_lazy(tensor) else f"{tensor.dtype} {list(tensor.shape)}"


def _set_on(tensor: torch.Tensor, twin: torch.Tensor | None, live: torch.Tensor) -> dict[str, object]:
    """Attributes that processing set on a tensor, and that the live one has otherwise."""
    before = {} if twin is None else twin.__dict__
    return {
        key: value
        for key, value in tensor.__dict__.items()
        if before.get(key, _ABSENT) is not value and live.__dict__.get(key, _ABSENT) is not value
    }


@contextmanager
def unmoved(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Code inside may write tensors, and not replace or move them; if it does or fails, they are where they were.

    Raises:
        HotweightsError: it has replaced or moved some.
    """
    before = [(module, contents(module)) for module in modules]
    memory = [(one, one.data) for _, held in before for _, one in held.tensors() if has_bytes(one)]
    try:
        yield
        replaced = sum(not _same_objects(contents(module), held) for module, held in before)
        replaced += sum(one.data_ptr() != data.data_ptr() for one, data in memory)
        if replaced:
            raise HotweightsError(
                "the model's own loading code replaced tensors that are live, instead of writing them"
            )
    except BaseException:
        for module, held in before:
            put(module, held)
        for one, data in memory:
            if one.data_ptr() != data.data_ptr():
                one.data = data
        raise


def _same_objects(one: Contents, other: Contents) -> bool:
    return {key: id(tensor) for key, tensor in one.tensors()} == {key: id(tensor) for key, tensor in other.tensors()}


def layers_of(model: nn.Module, chosen: Callable[[nn.Module], bool]) -> dict[nn.Module, list[str]]:
    """The modules for which ``chosen`` holds, each with all its names, in the model's order."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in found or chosen(module):
            found.setdefault(module, []).append(name)
    return found
