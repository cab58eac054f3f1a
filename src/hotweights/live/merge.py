"""Difference: what processing made new in a layer, and how it goes into the live layer."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import LiveModelError
from ..memory.wrappers import attributes_of, context, is_wrapper
from .attributes import ABSENT, Held, exchanged, hides_memory, is_opaque, remade, step, tensors_in
from .layers import Contents, Layer


class Difference(NamedTuple):
    """What processing made new.

    Attributes:
        values: pairs of a live tensor's qualified name and its new value.
        attributes: pairs of a live module, tensor or holder and what changes in its state.
        replaced: qualified names of objects that were replaced, and in which tensors cannot be seen.
    """

    values: list[tuple[str, torch.Tensor]]
    attributes: list[tuple[object, dict[Any, object]]]
    replaced: list[str]


def differences(
    layer: Layer, live: Contents, made: Contents, known: Container[str], idle: Container[str]
) -> Difference:
    """How ``made`` by processing differs from what is live.

    Args:
        layer: the layer.
        live: what it holds in kernel format.
        made: what processing made.
        known: qualified names of the tensors that the first load kept; tensors of other names belong to others.
        idle: qualified names of tensors that neither the update nor processing touches.

    Raises:
        LiveModelError: a live tensor would have to change its shape or dtype, or to come or go.
    """
    old = {key: tensor for key, tensor in live.tensors() if layer.full(key) not in idle}
    ours = {key: tensor for key, tensor in old.items() if layer.full(key) in known}
    new = {key: tensor for key, tensor in made.tensors() if layer.full(key) not in idle}
    strange = {path for path, _ in tensors_in(made.holders)} - layer.acted
    new = {
        key: tensor for key, tensor in new.items() if key in ours or (key not in strange and tensor is not old.get(key))
    }
    problems = [*_changes(layer, ours, new)]
    if problems:
        raise LiveModelError("processing made other tensors than the first time", problems)
    values = [(layer.full(key), tensor) for key, tensor in new.items() if tensor is not ours[key]]
    # A tensor that processing made anew with its old value is not written; the live one must stay in its place.
    kept = {key: tensor for key, tensor in live.tensors() if layer.full(key) in known}
    merge = _Merge(layer, live, made, kept, new)
    attributes = [*merge.attributes(), *merge.of_tensors()]
    if merge.hiding:  # Their hidden addresses point into what processing made: freed, they would read garbage.
        attributes.append((layer.beneath, {"tensors": [tensor for _, tensor in made.tensors()]}))
    return Difference(values, attributes, merge.replaced)


def _changes(layer: Layer, old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> Iterator[str]:
    yield from (f"{layer.full(key)}: is gone after processing" for key in old.keys() - new.keys())
    for key, tensor in new.items():
        if key not in old:
            yield f"{layer.full(key)}: was made by processing, but not the first time"
        elif _form(old[key]) != _form(tensor):
            yield f"{layer.full(key)}: {_form(old[key])} is live, processing made {_form(tensor)}"
        elif is_wrapper(tensor) and context(old[key]) != context(tensor):
            yield f"{layer.full(key)}: {context(old[key])} is live, processing made {context(tensor)}"


def _form(tensor: torch.Tensor) -> str:
    if nn.parameter.is_lazy(tensor):
        return f"{tensor.dtype}"
    kind = f"{type(tensor).__name__} " if is_wrapper(tensor) else ""
    return f"{kind}{tensor.dtype} {list(tensor.shape)}"


class _Merge:
    """What processing made, with live tensors and live holders in place of the new ones."""

    def __init__(
        self,
        layer: Layer,
        live: Contents,
        made: Contents,
        ours: Mapping[str, torch.Tensor],
        new: Mapping[str, torch.Tensor],
    ) -> None:
        self.replaced: list[str] = []
        self.hiding = False  # whether any of those may hide addresses
        self._layer, self._live, self._made, self._ours, self._new = layer, live, made, ours, new
        self._tensors = {id(tensor): ours[key] for key, tensor in made.tensors() if key in ours}
        self._targets = {path: self._target(path, held) for path, held in made.holders.items()}
        self._holders = {id(held.holder): self._targets[path].holder for path, held in made.holders.items()}

    def attributes(self) -> Iterator[tuple[object, dict[Any, object]]]:
        """What changes in the attributes of the module, and in holders."""
        yield self._layer.module, self._changes(self._live.attributes, self._made.attributes, str)
        for path, (_, state) in self._made.holders.items():
            holder, before = self._targets[path]
            named = partial(step, path, holder)
            changes = self._changes(before, state, named, every=self._layer.shares(holder))
            if changes and not isinstance(holder, tuple):
                yield holder, changes

    def of_tensors(self) -> Iterator[tuple[torch.Tensor, dict[Any, object]]]:
        """What changes in the attributes of live tensors."""
        for key, tensor in self._new.items():
            twin, live = self._layer.twin(key), self._ours[key]
            before, now = {} if twin is None else twin.__dict__, attributes_of(live)
            set_here = {
                name: self._tensors.get(id(value), value)
                for name, value in attributes_of(tensor).items()
                if before.get(name, ABSENT) is not value and not _equal(now.get(name, ABSENT), value)
            }
            if set_here and tensor is not live:
                yield live, set_here

    def _target(self, path: str, made: Held) -> Held:
        live = self._live.holders.get(path)
        return live if live is not None and type(live.holder) is type(made.holder) else made

    def _changes(
        self,
        old: Mapping[Any, object],
        new: Mapping[Any, object],
        named: Callable[[Any], str],
        *,
        every: bool = False,
    ) -> dict[Any, object]:
        """What differs from before, of what processing has set; ``every`` key of it, where other layers write too."""
        acted = {key: named(key) for key in (*old, *new) if named(key) in self._layer.acted}
        wanted = {
            key: self._merged(name, new[key], old.get(key, ABSENT)) if key in new else ABSENT
            for key, name in acted.items()
        }
        return {key: value for key, value in wanted.items() if every or value is not old.get(key, ABSENT)}

    def _merged(self, path: str, value: object, live: object) -> object:
        if path in self._ours:
            return self._ours[path]
        if isinstance(value, tuple):
            return self._tuple(path, value, live)
        merged = self._holders.get(id(value), value)
        if isinstance(value, torch.Tensor):
            return self._tensors.get(id(value), value)
        if merged is live or (type(live) is type(value) and id(value) not in self._holders and _equal(live, value)):
            return live
        if is_opaque(value) or (merged is value and id(value) in self._holders):
            self.replaced.append(self._layer.full(path))
            self.hiding |= hides_memory(value)
        return merged

    def _tuple(self, path: str, value: tuple[object, ...], live: object) -> object:
        made = exchanged(path, value, lambda _, tensor: self._tensors.get(id(tensor), tensor))
        assert isinstance(made, tuple)
        others = live if isinstance(live, tuple) and len(live) == len(made) else (ABSENT,) * len(made)
        items = [
            item if isinstance(item, torch.Tensor) else self._merged(step(path, value, number), item, other)
            for number, (item, other) in enumerate(zip(made, others, strict=True))
        ]
        if all(item is other for item, other in zip(items, others, strict=True)):
            return live
        return remade(made, items)


def _equal(live: object, made: object) -> bool:
    """Whether they are of one class and equal. What cannot be compared is not equal."""
    if live is made:
        return True
    try:
        return type(live) is type(made) and bool(live == made)
    except (RuntimeError, TypeError, ValueError):
        return False
