"""Requests: what the plan of an update asks of a source that can choose, by tensor. It moves no byte."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch

from ..loading.copy_step import place_of
from ..loading.requests import ranges_read
from ..manifest import TensorSpec
from ..plan.plan import LoadPlan
from ..plan.steps import Copy, Step
from ..ranges import range_of
from ..sources.contracts import Request
from .groups import LayerGroup

Room = Callable[[LayerGroup, Copy], torch.Tensor | None]


def requests(units: Iterable[LayerGroup], plan: LoadPlan, give: Room) -> list[Request]:
    """A request for each tensor that the units take, in their order, and for what the model's own code gets, last.

    Args:
        units: in the order in which they shall be filled.
        plan: which they are parts of.
        give: what ``Request.into`` asks.
    """
    place = {name: number for number, name in enumerate(plan.manifest)}
    takes: dict[str, list[tuple[LayerGroup, Step, bool]]] = defaultdict(list)
    for unit in units:
        for name in sorted(unit.sources, key=place.__getitem__):
            takes[name]  # Names in this order; what takes them follows.
        for step, at_once in _steps(unit):
            for name in step.sources:
                takes[name].append((unit, step, at_once))
    for name in plan.fallback:
        takes[name] = []
    return [_request(plan.manifest[name], found, give) for name, found in takes.items()]


def _steps(unit: LayerGroup) -> Iterator[tuple[Step, bool]]:
    """All that takes tensors; and whether it is done as they come, and by nothing but a copy."""
    first = min(unit.plan.levels, default=0)
    levels = unit.plan.levels or (first,) * len(unit.plan.steps)
    for step, level in zip(unit.plan.steps, levels, strict=True):
        yield step, level == first and isinstance(step, Copy)
    for pair in unit.plan.ties:
        yield from ((one, False) for one in pair)


def _request(spec: TensorSpec, takes: list[tuple[LayerGroup, Step, bool]], give: Room) -> Request:
    ranges = ranges_read(spec, [step for _, step, _ in takes])
    into = None
    if len(takes) == 1:
        unit, step, at_once = takes[0]
        if (
            at_once
            and isinstance(step, Copy)
            and (step.of is None or (range_of(step.of),) == ranges or _all(step, spec))
        ):
            into = partial(give, unit, step)
    return Request(spec.name, ranges, into)


def _all(step: Copy, spec: TensorSpec) -> bool:
    found = None if step.of is None else range_of(step.of)
    return found is not None and found.count == 1 and found.size == spec.nbytes


def room(step: Copy, spec: TensorSpec, destinations: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The bytes that the copy writes, ``uint8``; ``None`` where it does more than to put them one behind the other."""
    dtype = spec.dtype if step.of is None else step.of.dtype
    place = place_of(step, destinations).detach()
    if place.dtype != dtype or not place.is_cpu or not place.is_contiguous() or not place.numel():
        return None
    return place.view(-1).view(torch.uint8)
