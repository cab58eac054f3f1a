"""Units: which layers and steps of a plan are done as one, because they share memory or a program. Pure bookkeeping."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from ..boxes import Box, covered
from ..plan.disjoint_sets import DisjointSets
from ..plan.plan import LoadPlan
from ..plan.steps import Copy, Program, Step, read_too_early
from . import open_layers as accounting
from .layers import Layer
from .layout import MemoryLayout


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """Layers that are opened, filled, processed and closed together; most of the time it is one.

    Attributes:
        name: of its first layer, for people.
        layers: in the order in which they are processed.
        names: the tensors for which it takes scratch: its layers', and what shares memory or a program with them; none
            in a unit of what is written where it lies.
        loose: those of ``names`` that belong to no layer of it; they are copied as they are.
        still: those of ``names`` whose memory no step writes.
        plan: the steps that fill it.
        touched: every tensor of the model that the steps name.
        sources: every tensor of the source that they take.
        direct: whether it is written where it lies.
        deferred: whether it comes after all others.
    """

    name: str
    layers: tuple[Layer, ...]
    names: tuple[str, ...]
    loose: tuple[str, ...]
    still: frozenset[str]
    plan: LoadPlan
    touched: frozenset[str]
    sources: frozenset[str]
    direct: bool
    deferred: bool

    def device_nbytes(self, spans: MemoryLayout) -> int:
        """Bytes of scratch that it takes on devices."""
        numbers = {spans.of(name) for name in self.names}
        return sum(spans.nbytes[one] for one in numbers if accounting.is_device(spans.devices[one]))


def units_of(plan: LoadPlan, layers: Sequence[Layer], spans: MemoryLayout) -> tuple[LayerGroup, list[LayerGroup]]:
    """What is written where it lies, as one unit without layers; and the others, in the order of their layers."""
    together = _joined(plan, layers, spans)
    scratched: dict[str, list[Layer]] = {}
    for layer in layers:
        scratched.setdefault(together.of(f"\0{layer.name}"), []).append(layer)
    for step in plan.steps:  # On a device, programs run where they ran at first, to the last bit.
        if isinstance(step, Program) and any(name in spans and _on_device(spans, name) for name in _named(step)):
            scratched.setdefault(together.of(_named(step)[0]), [])
    steps: dict[str, list[int]] = {}
    for number, step in enumerate(plan.steps):
        root = together.of(_named(step)[0]) if _named(step) else ""
        steps.setdefault(root if root in scratched else "", []).append(number)
    names: dict[str, list[str]] = {}
    for group in spans.together():
        names.setdefault(together.of(group[0]), []).extend(group)
    units = [_unit(plan, steps.get(root, ()), found, names.get(root, ()), spans) for root, found in scratched.items()]
    return _unit(plan, steps.get("", ()), (), (), spans), units


def _joined(plan: LoadPlan, layers: Sequence[Layer], spans: MemoryLayout) -> DisjointSets:
    together = DisjointSets()
    for layer in layers:
        together.join([f"\0{layer.name}", *layer.captured()])
    for group in spans.together():
        together.join(group)
    for step in plan.steps:
        together.join(_named(step))
    if plan.fallback:  # The model's own code may write to all of them.
        together.join(f"\0{layer.name}" for layer in layers)
    return together


def parts_of(unit: LayerGroup, spans: MemoryLayout) -> Iterator[LayerGroup]:
    """A unit without layers as several: all plain copies, and each group of steps that must wait for one another."""
    plan = unit.plan
    together = DisjointSets()
    waiting: set[str] = set()
    for group in spans.together():
        together.join(group)
    for step in plan.steps:
        together.join(_named(step))
    for step in plan.steps:
        waiting |= {together.of(name) for name in _named(step)} if isinstance(step, Program) else set()
    waiting |= {together.of(one.destination) for pair in plan.ties for one in pair}
    steps: dict[str, list[int]] = {}
    for number, step in enumerate(plan.steps):
        root = together.of(_named(step)[0]) if _named(step) else ""
        steps.setdefault(root if root in waiting else "", []).append(number)
    yield from (_unit(plan, numbers, (), (), spans) for numbers in steps.values())


def _on_device(spans: MemoryLayout, name: str) -> bool:
    return spans.devices[spans.of(name)].type != "cpu"


def _unit(
    plan: LoadPlan, numbers: Iterable[int], layers: Sequence[Layer], names: Sequence[str], spans: MemoryLayout
) -> LayerGroup:
    numbers = list(numbers)
    steps = tuple(plan.steps[number] for number in numbers)
    touched = {name for step in steps for name in _named(step)}
    written = {spans.of(name) for step in steps for name, _ in step.written if name in spans}
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
        loose=tuple(name for name in names if name not in own),
        still=frozenset(name for name in names if spans.of(name) not in written),
        plan=part,
        touched=frozenset(touched),
        sources=frozenset(name for step in (*steps, *(one for pair in ties for one in pair)) for name in step.sources),
        direct=not layers and not names,
        deferred=any(layer.deferred for layer in layers),
    )


def _named(step: Step) -> list[str]:
    """The model's tensors that a step writes or reads, those that it writes first."""
    if isinstance(step, Copy):
        return [step.destination]
    regions = [*step.writes, *(region for op in step.ops for region in op.reads)]
    return list(dict.fromkeys(region.memory.name for region in regions if region.memory.kind == "model"))


Coverage = Mapping[str, list[Box]]
"""Which boxes of each of the model's tensors a plan writes, by the tensor's first name."""


def coverage(plan: LoadPlan) -> dict[str, list[Box]]:
    """What the plan writes."""
    found: dict[str, dict[Box, None]] = {}
    for step in plan.steps:
        for name, box in step.written:
            target = plan.targets.get(name)
            if target is not None:
                found.setdefault(target.owner, {})[target.box if box is None else box] = None
    return {owner: list(boxes) for owner, boxes in found.items()}


def elements(covers: Coverage, plan: LoadPlan, name: str) -> int:
    """How many elements of one of the model's tensors are written."""
    target = plan.targets.get(name)
    return 0 if target is None else covered(covers.get(target.owner, ()), plan.targets[target.owner].box)


def needs_initial(plan: LoadPlan, unit: LayerGroup, covers: Coverage, spans: MemoryLayout) -> set[str]:
    """Tensors whose values from before the first load have a say in what the unit becomes.

    Those of its layers that the plan does not write, or not all of, and those that a step reads before it writes them.
    """
    found = {name for name in unit.names if elements(covers, plan, name) < spans.box(name).numel}
    written: dict[str, list[Box]] = {}
    for step in chain.from_iterable(unit.plan.by_level()):
        if isinstance(step, Program):
            found |= read_too_early(step.ops, written)
        elif step.destination in plan.targets:
            box = plan.targets[step.destination].box if step.into is None else step.into
            written.setdefault(step.destination, []).append(box)
    return {name for name in found if name in spans}
