"""Processing: layers in checkpoint format become kernel format, and what came of it goes to the strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn

from .. import signals
from ..dtypes import DType, format_name
from ..errors import PlanError, UsageError
from ..failure import blame
from ..memory.aliases import has_bytes
from ..model.materialise import dressed
from ..model.places import Place, places
from ..timeline import Timeline
from .groups import LayerGroup
from .job import Job
from .kernels import processes
from .layers import Contents, Dressing, Layer, put, put_back
from .layout import Mirror
from .merge import differences
from .strategy import Shown, Strategy


class Processing:
    """The processing of one update.

    Attributes:
        begun: groups whose processing in place, at the first load, has begun.
        replaced: qualified names of objects that processing replaced, and in which tensors cannot be seen.
        twice: what the model's own loading code has quantised and ``process=`` has changed after that.
    """

    def __init__(self, job: Job, strategy: Strategy, timeline: Timeline) -> None:
        self.begun: list[LayerGroup] = []
        self.replaced: list[str] = []
        self.twice: list[str] = []
        self._shared: list[tuple[Layer, object, dict[Any, object]]] = []
        self._shown: Shown | None = None  # while the model shows what was made so far
        self._job = job
        self._strategy = strategy
        self._timeline = timeline

    @signals.held
    def first(self, group: LayerGroup) -> None:
        """Process the layers of a group in place: the first load."""
        if group.layers:
            self.begun.append(group)
        for layer in group.layers:
            before, where = layer.contents(), _whereabouts(layer)
            quantised = self._quantised(layer, before)
            if quantised and layer.module in self._job.unasked and processes(layer.module):
                raise _once_too_often(layer, quantised)
            self._process(layer)
            layer.processed(before, layer.contents())
            # In place it may have changed values, which nobody sees: then a quant_method is taken at its word.
            layer.made = processes(layer.module) or where != _whereabouts(layer)
            self.twice += quantised if layer.made else ()
        now = {name: tensor for layer in group.layers for name, tensor in layer.tensors().items()}
        # What processing replaced must not be held until the last layer: it would double the model's memory.
        for name in group.names if group.layers else ():
            self._job.live.pop(name, None)
        self._job.acted.update(group.unwritten - self._untouched(group, now))

    def _quantised(self, layer: Layer, now: Contents) -> list[str]:
        """What the model's own loading code has quantised of a layer that is to be processed."""
        targets = self._job.plan.targets
        made = ((layer.full(key), tensor) for key, tensor in now.own())
        return [
            f"{name}: {format_name(spec.dtype)} {list(spec.shape)} before; {code} left it as "
            f"{format_name(tensor.dtype)} {list(tensor.shape)}"
            for code in [f"{type(self._job.model).__name__}.load_weights"]
            for name, tensor in made
            if name in targets and _is_quantised((spec := targets[name].spec).dtype, tensor.dtype)
        ]

    @signals.held
    def run(self, group: LayerGroup, scratch: Mirror, *, ready: Callable[[], None]) -> None:
        """Process the layers of a group in their scratch, and hand over what came of it.

        ``ready`` is called when they are open and not yet processed. Nobody may read the model meanwhile.
        """
        shown = self._shown
        live = [layer.contents(shown and shown.live.get(layer.module)) for layer in group.layers]
        made = self._processed(group, scratch, ready, live if shown is None else None)
        with self._timeline.event("write", group.name):
            names = self._hand_over(group, scratch, live, made)
        if shown is not None and shown.live:
            for layer, held in zip(group.layers, made, strict=True):
                put(layer.module, held)
            shown.show(names, {layer.module for layer in group.layers})

    @contextmanager
    @signals.held
    def showing(self) -> Iterator[None]:
        """Inside, layers see what all others made before them: the deferred ones. Nobody may read the model meanwhile.

        It is entered once for all of them, for it walks the model.
        """
        with self._strategy.showing(self._job.model) as self._shown:
            try:
                yield
            finally:
                self._shown = None

    def settle(self) -> None:
        """Give what several layers share the state that the last of them made, in the order of the first load."""
        groups = sorted(self._job.groups, key=lambda group: group.deferred)
        order = {layer: number for number, layer in enumerate(layer for group in groups for layer in group.layers)}
        for _, holder, changes in sorted(self._shared, key=lambda change: order[change[0]]):
            self._strategy.attribute(holder, changes)

    def _hand_over(self, group: LayerGroup, scratch: Mirror, live: list[Contents], made: list[Contents]) -> list[str]:
        """Give the strategy what came of a group. Returns the names of the tensors that it got."""
        pairs = [*zip(group.layers, made, strict=True)]
        now = {layer.full(key): tensor for layer, held in pairs for key, tensor in held.tensors()}
        idle = self._untouched(group, now | {name: scratch[name] for name in group.without_layer}) - self._job.acted
        self._job.acted.update(group.unwritten - idle)
        idle -= self._job.restored  # They hold what an earlier version brought.
        made_new = [
            differences(layer, old, new, self._job.live, idle)
            for layer, old, new in zip(group.layers, live, made, strict=True)
        ]
        apart = [(name, scratch[name]) for name in group.without_layer if name not in idle and name in self._job.live]
        values = [*(pair for difference in made_new for pair in difference.values), *apart]
        self._strategy.deliver(values)
        for holder, attributes in (pair for difference in made_new for pair in difference.attributes):
            self._strategy.attribute(holder, attributes)
        for layer, difference in zip(group.layers, made_new, strict=True):
            self._shared += [(layer, *pair) for pair in difference.attributes if layer.shares(pair[0])]
        self.replaced += [name for difference in made_new for name in difference.replaced]
        return [name for name, _ in values]

    @signals.held
    def _processed(
        self, group: LayerGroup, scratch: Mirror, ready: Callable[[], None], held: list[Contents] | None
    ) -> list[Contents]:
        """What the layers hold after processing. The model is as it was when this returns: they hold ``held``."""
        apart = [(place, place.tensor) for place in self._apart(group)]
        held = [layer.contents() for layer in group.layers] if held is None else held
        before = [*zip(group.layers, held, strict=True)]
        dressing: Dressing = {}
        try:
            for place, tensor in apart:
                place.put(dressed(scratch[place.name], tensor))
            opened = [layer.open(scratch.__getitem__, dressing) for layer in group.layers]
            ready()
            if self._job.plan.fallback or len(group.layers) > 1:  # Loading code ran, or another layer was opened.
                opened = [_after_loading(layer, held) for layer, held in zip(group.layers, opened, strict=True)]
            for layer in group.layers:
                self._process(layer)
            made = [layer.contents() for layer in group.layers]
            for layer, then, now in zip(group.layers, opened, made, strict=True):
                layer.processed(then, now)
            return made
        finally:
            _put_back(before, apart)

    def _apart(self, group: LayerGroup) -> list[Place]:
        """Where the tensors of the group lie that belong to none of its layers."""
        return [place for name in group.without_layer for place in self._places.get(name, ())]

    @cached_property
    def _places(self) -> dict[str, list[Place]]:
        """The places of all tensors without a layer. A walk over the model for each group would be quadratic."""
        names = {name for group in self._job.groups for name in group.without_layer}
        found: dict[str, list[Place]] = {}
        for place in places(self._job.model) if names else ():
            if place.name in names:
                found.setdefault(place.name, []).append(place)
        return found

    @signals.held
    def _process(self, layer: Layer) -> None:
        with self._timeline.event("process", layer.name), torch.no_grad():
            try:
                made = self._job.process(layer.module)
                if isinstance(made, nn.Module) and made is not layer.module:
                    raise UsageError(
                        f"process= returned a {type(made).__name__}, which nobody would use; it changes the layer that "
                        "it is given, in place, and returns None"
                    )
            except Exception as error:
                named = f"layer {layer.name}" if layer.name else "the model itself"
                blame(error, f"the processing of {named} ({type(layer.module).__name__})")
                raise

    def _untouched(self, group: LayerGroup, now: Mapping[str, torch.Tensor]) -> set[str]:
        """Names of tensors that no step writes, and that hold what they held before the first load."""
        initial = self._job.initial
        return {name for name in group.unwritten & initial.keys() & now.keys() if _same_bits(initial[name], now[name])}


def _is_quantised(before: DType, now: torch.dtype) -> bool:
    """Whether what were floats of two bytes or more are integers, or floats of one byte."""
    if not isinstance(before, torch.dtype) or not before.is_floating_point or before.itemsize < 2:
        return False
    return now.itemsize == 1 or not (now.is_floating_point or now.is_complex)


def _whereabouts(layer: Layer) -> dict[str, tuple[int, int]]:
    return {key: (tensor.data_ptr() if has_bytes(tensor) else 0, id(tensor)) for key, tensor in layer.contents().own()}


def _after_loading(layer: Layer, opened: Contents) -> Contents:
    """What a layer held before processing, where loading code of its own has changed it since it was opened.

    What that has put into containers is not processing's doing. A container that it put in another's place is new in
    all it holds: else the live one would keep what it held.
    """
    now, before = layer.contents().holders, opened.holders
    same = {path: held for path, held in now.items() if path not in before or before[path].holder is held.holder}
    return opened._replace(holders=same)


@signals.whole
def _put_back(before: list[tuple[Layer, Contents]], apart: list[tuple[Place, torch.Tensor]]) -> None:
    put_back((layer.module, held) for layer, held in before)
    for place, tensor in apart:
        place.put(tensor)


def _same_bits(initial: torch.Tensor, now: torch.Tensor) -> bool:
    if (initial.dtype, initial.shape) != (now.dtype, now.shape) or not has_bytes(now):
        return False
    raw = (tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) for tensor in (initial, now))
    return torch.equal(*raw)


def _once_too_often(layer: Layer, quantised: list[str]) -> PlanError:
    """Nobody asked for it. Who gives ``process=`` has chosen, and is warned."""
    return PlanError(
        f"layer {layer.name} is quantised when its quant_method would process it, which may be once too often",
        quantised,
        advice="If the loading code has done all: LiveModel(model, process=lambda layer: None). If the "
        "quant_method is to process what it made: LiveModel(model, process=lambda layer: "
        "layer.quant_method.process_weights_after_loading(layer), layers=lambda layer: "
        "hasattr(layer, 'quant_method')).",
    )
