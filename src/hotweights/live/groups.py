"""LayerGroup: layers and steps of a plan that are done as one, because they share memory or a program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from ..boxes import Box, covered
from ..plan.disjoint_sets import DisjointSets
from ..plan.plan import LoadPlan
from ..plan.steps import Copy, Program, Step, read_too_early
from . import open_layers
from .layers import Layer
from .layout import MemoryLayout


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """Layers that are opened, filled, processed and closed together; most of the time it is one.

    Attributes:
        name: the name of its first layer, for people.
        layers: in the order in which they are processed.
        names: the tensors that get scratch: those of its layers, and what shares memory or a program with them. Empty
            for the group that is written in place.
        without_layer: those of ``names`` that belong to none of its layers; they are copied unprocessed.
        unwritten: those of ``names`` whose memory no step writes.
        plan: the steps that fill it.
        touched: every tensor of the model that the steps name.
        sources: every tensor of the source that the steps take.
        in_place: whether its steps write into the live tensors, without scratch.
        deferred: whether it comes after all others.
    """

    name: str
    layers: tuple[Layer, ...]
    names: tuple[str, ...]
    without_layer: tuple[str, ...]
    unwritten: frozenset[str]
    plan: LoadPlan
    touched: frozenset[str]
    sources: frozenset[str]
    in_place: bool
    deferred: bool

    def device_nbytes(self, layout: MemoryLayout) -> int:
        """Bytes of scratch that it takes on devices."""
        spans = {layout.of(name) for name in self.names}
        return sum(layout.nbytes[span] for span in spans if open_layers.is_device(layout.devices[span]))


def groups_of(plan: LoadPlan, layers: Sequence[Layer], layout: MemoryLayout) -> tuple[LayerGroup, list[LayerGroup]]:
    """The group that is written in place, and the groups that need scratch, in the order of their layers."""
    together = _joined(plan, layers, layout)
    scratched: dict[str, list[Layer]] = {}
    for layer in layers:
        scratched.setdefault(together.of(f"\0{layer.name}"), []).append(layer)
    # On a device, programs run in scratch as at the first load: elsewhere the last bit of a result may differ.
    for step in plan.steps:
        if isinstance(step, Program) and any(name in layout and _on_device(layout, name) for name in _named(step)):
            scratched.setdefault(together.of(_named(step)[0]), [])
    steps: dict[str, list[int]] = {}
    for number, step in enumerate(plan.steps):
        root = together.of(_named(step)[0]) if _named(step) else ""
        steps.setdefault(root if root in scratched else "", []).append(number)
    names: dict[str, list[str]] = {}
    for overlapping in layout.together():
        names.setdefault(together.of(overlapping[0]), []).extend(overlapping)
    groups = [
        _group(plan, steps.get(root, ()), inside, names.get(root, ()), layout) for root, inside in scratched.items()
    ]
    return _group(plan, steps.get("", ()), (), (), layout), groups


def _joined(plan: LoadPlan, layers: Sequence[Layer], layout: MemoryLayout) -> DisjointSets:
    together = DisjointSets()
    for layer in layers:
        together.join([f"\0{layer.name}", *layer.captured()])
    for overlapping in layout.together():
        together.join(overlapping)
    for step in plan.steps:
        together.join(_named(step))
    if plan.fallback:  # The model's own code may write to all of them.
        together.join(f"\0{layer.name}" for layer in layers)
    return together


def parts_of(group: LayerGroup, layout: MemoryLayout) -> Iterator[LayerGroup]:
    """The group that is written in place, taken apart: all plain copies, and each set of steps that wait for others."""
    plan = group.plan
    together = DisjointSets()
    waiting: set[str] = set()
    for overlapping in layout.together():
        together.join(overlapping)
    for step in plan.steps:
        together.join(_named(step))
    for step in plan.steps:
        waiting |= {together.of(name) for name in _named(step)} if isinstance(step, Program) else set()
    waiting |= {together.of(step.destination) for pair in plan.ties for step in pair}
    steps: dict[str, list[int]] = {}
    for number, step in enumerate(plan.steps):
        root = together.of(_named(step)[0]) if _named(step) else ""
        steps.setdefault(root if root in waiting else "", []).append(number)
    yield from (_group(plan, numbers, (), (), layout) for numbers in steps.values())


def _on_device(layout: MemoryLayout, name: str) -> bool:
    return layout.devices[layout.of(name)].type != "cpu"


def _group(
    plan: LoadPlan, numbers: Iterable[int], layers: Sequence[Layer], names: Sequence[str], layout: MemoryLayout
) -> LayerGroup:
    numbers = list(numbers)
    steps = tuple(plan.steps[number] for number in numbers)
    touched = {name for step in steps for name in _named(step)}
    written = {layout.of(name) for step in steps for name, _ in step.written if name in layout}
    own = {name for layer in layers for name in layer.captured()}
    ties = tuple(pair for pair in plan.ties if pair[0].destination in touched)
    part = replace(
        plan,
        steps=steps,
        levels=tuple(plan.levels[number] for number in numbers) if plan.levels else (),
        ties=ties,
        fallback=(),
    )
    first = layers[0].name or type(layers[0].module).__name__ if layers else "".join(names[:1])
    return LayerGroup(
        name=first,
        layers=tuple(layers),
        names=tuple(names),
        without_layer=tuple(name for name in names if name not in own),
        unwritten=frozenset(name for name in names if layout.of(name) not in written),
        plan=part,
        touched=frozenset(touched),
        sources=frozenset(name for step in (*steps, *chain.from_iterable(ties)) for name in step.sources),
        in_place=not layers and not names,
        deferred=any(layer.deferred for layer in layers),
    )


def _named(step: Step) -> list[str]:
    """The model's tensors that a step writes and reads; those that it writes come first."""
    if isinstance(step, Copy):
        return [step.destination]
    regions = [*step.writes, *(region for op in step.ops for region in op.reads)]
    return list(dict.fromkeys(region.memory.name for region in regions if region.memory.kind == "model"))


Coverage = Mapping[str, list[Box]]
"""Which boxes of each of the model's tensors a plan writes, by the tensor's first name."""


def coverage(plan: LoadPlan) -> dict[str, list[Box]]:
    """What the plan writes."""
    boxes: dict[str, dict[Box, None]] = {}
    for step in plan.steps:
        for name, box in step.written:
            target = plan.targets.get(name)
            if target is not None:
                boxes.setdefault(target.owner, {})[target.box if box is None else box] = None
    return {owner: list(several) for owner, several in boxes.items()}


def elements(covers: Coverage, plan: LoadPlan, name: str) -> int:
    """How many elements of one of the model's tensors the plan writes."""
    target = plan.targets.get(name)
    return 0 if target is None else covered(covers.get(target.owner, ()), plan.targets[target.owner].box)


def needs_initial(plan: LoadPlan, group: LayerGroup, covers: Coverage, layout: MemoryLayout) -> set[str]:
    """Tensors whose values from before the first load decide what the group becomes.

    Those are tensors of its layers that the plan writes only in part or not at all, and tensors that a step reads
    before it writes them.
    """
    names = {name for name in group.names if elements(covers, plan, name) < layout.box(name).numel}
    written: dict[str, list[Box]] = {}
    for step in chain.from_iterable(group.plan.by_level()):
        if isinstance(step, Program):
            names |= read_too_early(step.ops, written)
        elif step.destination in plan.targets:
            box = plan.targets[step.destination].box if step.into is None else step.into
            written.setdefault(step.destination, []).append(box)
    return {name for name in names if name in layout}
