"""Processing: layers in checkpoint format become what their kernels use. It opens and fills none; a way keeps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from ..memory.aliases import has_bytes
from ..model.materialise import dressed
from ..model.places import places
from .atomic import Strategy
from .groups import LayerGroup
from .job import Job
from .layers import Contents, Dressing, Layer, put
from .layout import Mirror
from .merge import differences
from .report import Timeline


class Processing:
    """That of one update.

    Attributes:
        begun: units that were processed, or nearly, where they are.
        replaced: qualified names of objects in which nobody sees tensors, and which are others now.
    """

    def __init__(self, job: Job, way: Strategy, timeline: Timeline) -> None:
        self.begun: list[LayerGroup] = []
        self.replaced: list[str] = []
        self._shared: list[tuple[Layer, object, dict[Any, object]]] = []
        self._job = job
        self._way = way
        self._timeline = timeline

    def first(self, unit: LayerGroup) -> None:
        """Process its layers where they are, for the first time."""
        if unit.layers:
            self.begun.append(unit)
        for layer in unit.layers:
            before = layer.contents()
            with self._timeline.event("process", layer.name), torch.no_grad():
                self._job.process(layer.module)
            layer.processed(before, layer.contents())
        now = {name: one for layer in unit.layers for name, one in layer.tensors().items()}
        for name in unit.names if unit.layers else ():  # What processing replaced must not stay until the last layer.
            self._job.live.pop(name, None)
        self._job.acted.update(unit.still - self._untouched(unit, now))

    def run(self, unit: LayerGroup, scratch: Mirror, *, ready: Callable[[], None]) -> None:
        """Process the layers of a unit in their scratch, and hand over what came of it.

        ``ready`` is called when they are open and not yet processed. Nobody may read the model meanwhile.
        """
        live = [layer.contents() for layer in unit.layers]
        with self._way.showing(self._job.model) if unit.deferred else nullcontext():
            made = self._processed(unit, scratch, ready)
        with self._timeline.event("write", unit.name):
            self._hand_over(unit, scratch, live, made)

    def settle(self) -> None:
        """What layers share is as the last of them has it, in the order of the first load, whatever came last here."""
        units = sorted(self._job.units, key=lambda unit: unit.deferred)
        order = {layer: number for number, layer in enumerate(layer for unit in units for layer in unit.layers)}
        for _, holder, changes in sorted(self._shared, key=lambda one: order[one[0]]):
            self._way.attribute(holder, changes)

    def _hand_over(self, unit: LayerGroup, scratch: Mirror, live: list[Contents], made: list[Contents]) -> None:
        pairs = [*zip(unit.layers, made, strict=True)]
        now = {layer.full(key): one for layer, held in pairs for key, one in held.tensors()}
        idle = self._untouched(unit, now | {name: scratch[name] for name in unit.loose}) - self._job.acted
        self._job.acted.update(unit.still - idle)
        found = [
            differences(layer, old, new, self._job.live, idle)
            for layer, old, new in zip(unit.layers, live, made, strict=True)
        ]
        loose = [(name, scratch[name]) for name in unit.loose if name not in idle and name in self._job.live]
        for name, value in (*(pair for one in found for pair in one.values), *loose):
            self._way.deliver(name, value)
        for holder, attributes in (pair for one in found for pair in one.attributes):
            self._way.attribute(holder, attributes)
        for layer, one in zip(unit.layers, found, strict=True):
            self._shared += [(layer, *pair) for pair in one.attributes if layer.shares(pair[0])]
        self.replaced += [name for one in found for name in one.replaced]

    def _processed(self, unit: LayerGroup, scratch: Mirror, ready: Callable[[], None]) -> list[Contents]:
        """What the layers hold after processing. The model is as it was when this returns."""
        # Hardly any unit has loose ones, and a walk over the model for each layer would be quadratic.
        all_places = places(self._job.model) if unit.loose else ()
        loose = [(place, place.tensor) for place in all_places if place.name in unit.loose]
        before = [(layer, layer.contents()) for layer in unit.layers]
        dressing: Dressing = {}
        try:
            for place, tensor in loose:
                place.put(dressed(scratch[place.name], tensor))
            opened = [layer.open(scratch.__getitem__, dressing) for layer in unit.layers]
            ready()
            # What loading code keeps in containers is none of processing's.
            opened = [
                held._replace(holders=layer.contents().holders) for layer, held in zip(unit.layers, opened, strict=True)
            ]
            for layer in unit.layers:
                with self._timeline.event("process", layer.name), torch.no_grad():
                    self._job.process(layer.module)
            made = [layer.contents() for layer in unit.layers]
            for layer, then, now in zip(unit.layers, opened, made, strict=True):
                layer.processed(then, now)
            return made
        finally:
            for layer, held in before:
                put(layer.module, held)
            for place, tensor in loose:
                place.put(tensor)

    def _untouched(self, unit: LayerGroup, now: Mapping[str, torch.Tensor]) -> set[str]:
        """Names of tensors that no step writes and that hold what they held before the first load."""
        initial = {name: self._job.initial[name] for name in unit.still & self._job.initial.keys()}
        return {name for name, one in initial.items() if name in now and _same_bits(one, now[name])}


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape) or not has_bytes(other):
        return False
    raw = (tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*raw)
