"""Units: which layers and steps of a plan are done as one, because they share memory or a program. Pure bookkeeping."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..plan import Copy, LoadPlan, Program, Step
from ..regions import Box, covered
from ..steps import OVERWRITES
from .accounting import is_device
from .layers import Layer
from .spans import Spans

__all__ = ["Unit", "coverage", "needs_initial", "units_of"]


@dataclass(frozen=True, eq=False)
class Unit:
    """Layers that are opened, filled, processed and closed together; most of the time it is one.

    Attributes:
        name: of its first layer, for people.
        layers: in the order in which they are processed; none in the unit of all that is written where it lies.
        names: the tensors for which it takes scratch: its layers', and what shares memory or a program with them.
        loose: those of ``names`` that belong to no layer of it; they are copied as they are.
        plan: the steps that fill it.
        touched: every tensor of the model that the steps name.
        deferred: whether it comes after all others.
    """

    name: str
    layers: tuple[Layer, ...]
    names: tuple[str, ...]
    loose: tuple[str, ...]
    plan: LoadPlan
    touched: frozenset[str]
    deferred: bool = False
    sources: frozenset[str] = field(default_factory=frozenset)

    def device_nbytes(self, spans: Spans) -> int:
        """Bytes of scratch that it takes on devices."""
        numbers = {spans.of(name) for name in self.names if name in spans}
        return sum(spans.nbytes[one] for one in numbers if is_device(spans.devices[one]))


def units_of(plan: LoadPlan, layers: Sequence[Layer], spans: Spans) -> tuple[Unit, list[Unit]]:
    """What is written where it lies, as one unit without layers; and the others, in the order of their layers."""
    together = _Together()
    own: dict[str, Layer] = {}
    for layer in layers:
        captured = list(layer.captured())
        own |= dict.fromkeys(captured, layer)
        together.join([f"\0{layer.name}", *captured])
    for group in spans.together():
        together.join(group)
    for step in plan.steps:
        together.join(_named(step))
    if plan.fallback:  # The model's own code may write to all of them.
        together.join(f"\0{layer.name}" for layer in layers)
    scratched: dict[str, list[Layer]] = {together.of(f"\0{layer.name}"): [] for layer in layers}
    for layer in layers:
        scratched[together.of(f"\0{layer.name}")].append(layer)
    for step in plan.steps:  # On a device, programs run where they ran at first, to the last bit.
        if isinstance(step, Program) and any(name in spans and _on_device(spans, name) for name in _named(step)):
            scratched.setdefault(together.of(_named(step)[0]), [])
    steps: dict[str, list[int]] = {}
    for number, step in enumerate(plan.steps):
        root = together.of(_named(step)[0]) if _named(step) else ""
        steps.setdefault(root if root in scratched else "", []).append(number)
    names: dict[str, list[str]] = {}
    for group in spans.together():
        for name in group:
            names.setdefault(together.of(name), []).append(name)
    direct = _unit("", (), (), (), plan, steps.get("", ()))
    return direct, [
        _unit(
            found[0].name if found else names[root][0],
            tuple(found),
            tuple(names.get(root, ())),
            tuple(name for name in names.get(root, ()) if name not in own),
            plan,
            steps.get(root, ()),
        )
        for root, found in scratched.items()
    ]


def _on_device(spans: Spans, name: str) -> bool:
    return spans.devices[spans.of(name)].type != "cpu"


def _unit(
    name: str,
    layers: tuple[Layer, ...],
    names: tuple[str, ...],
    loose: tuple[str, ...],
    plan: LoadPlan,
    numbers: Iterable[int],
) -> Unit:
    numbers = list(numbers)
    steps = tuple(plan.steps[number] for number in numbers)
    written = {name for step in steps for name in _named(step)}
    ties = tuple(pair for pair in plan.ties if pair[0].destination in written)
    part = replace(
        plan,
        steps=steps,
        levels=tuple(plan.levels[number] for number in numbers) if plan.levels else (),
        ties=ties,
        fallback=(),
    )
    sources = {name for step in (*steps, *(one for pair in ties for one in pair)) for name in _sources(step)}
    deferred = any(layer.deferred for layer in layers)
    return Unit(name, layers, names, loose, part, frozenset(written), deferred, frozenset(sources))


class _Together:
    """Names that were joined, by one of them."""

    def __init__(self) -> None:
        self._above: dict[str, str] = {}

    def of(self, name: str) -> str:
        while (above := self._above.setdefault(name, name)) != name:
            self._above[name] = name = self._above[above]
        return name

    def join(self, names: Iterable[str]) -> None:
        first = None
        for name in names:
            root = self.of(name)
            if first is None:
                first = root
            self._above[root] = first


def _sources(step: Step) -> tuple[str, ...]:
    return (step.source,) if isinstance(step, Copy) else step.sources


def _named(step: Step) -> list[str]:
    """The model's tensors that a step writes or reads, those that it writes first."""
    if isinstance(step, Copy):
        return [step.destination]
    regions = [*step.writes, *(region for op in step.ops for region in op.reads)]
    return list(dict.fromkeys(region.memory.name for region in regions if region.memory.kind == "model"))


def _writes(step: Step) -> Iterator[tuple[str, Box | None]]:
    if isinstance(step, Copy):
        yield step.destination, step.into
    else:
        yield from ((region.memory.name, region.box) for region in step.writes)


def coverage(plan: LoadPlan) -> dict[str, int]:
    """How many elements of each of the model's tensors the plan writes, by its first name."""
    boxes: dict[str, list[Box]] = {}
    whole: dict[str, int] = {}
    for step in plan.steps:
        for name, box in _writes(step):
            target = plan.targets.get(name)
            owner = name if target is None else target.owner
            if target is not None and (box is None or box == target.box):
                whole[owner] = target.box.numel
            elif box is not None:
                boxes.setdefault(owner, []).append(box)
    for owner, several in boxes.items():
        if owner not in whole and owner in plan.targets:
            whole[owner] = covered(several, plan.targets[owner].box)
    return whole


def needs_initial(plan: LoadPlan, unit: Unit, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Tensors whose values from before the first load have a say in what the unit becomes.

    Those of its layers that the plan does not write, or not all of, and those that a step reads before it writes them.
    """
    full = coverage(plan)
    found = set()
    for name in unit.names:
        target = plan.targets.get(name)
        owner = name if target is None else target.owner
        if name in tensors and full.get(owner, 0) < tensors[name].numel():
            found.add(name)
    written: dict[str, list[Box]] = {}
    for step in unit.plan.steps:
        if isinstance(step, Program):
            found |= _read_too_early(step, written)
        for name, box in _writes(step):
            if name in tensors:
                written.setdefault(name, []).append(plan.targets[name].box if box is None else box)
    return {name for name in found if name in tensors and (name in unit.names or name in written)}


def _read_too_early(step: Program, written: dict[str, list[Box]]) -> set[str]:
    found = set()
    here = {name: list(boxes) for name, boxes in written.items()}
    for op in step.ops:
        overwritten = op.writes[:1] if op.func in OVERWRITES else ()
        for region in op.reads:
            if region.memory.kind == "model" and region not in overwritten:
                name = region.memory.name
                if covered(here.get(name, []), region.box) < region.box.numel:
                    found.add(name)
        for region in op.writes:
            here.setdefault(region.memory.name, []).append(region.box)
    return found
