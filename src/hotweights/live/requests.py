"""Requests: what an update asks of a source that sends only what it is asked for, tensor by tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch

from ..loading.copy_step import place_of
from ..loading.requests import ranges_read, rounded_to
from ..manifest import TensorSpec
from ..plan.plan import LoadPlan
from ..plan.steps import Copy, Step
from ..ranges import range_of
from ..sources.contracts import Request
from .groups import LayerGroup

Room = Callable[[LayerGroup, Copy], torch.Tensor | None]


def requests(groups: Iterable[LayerGroup], plan: LoadPlan, give: Room) -> list[Request]:
    """A request for each tensor that the groups take, in their order, and for what the model's own code gets, last.

    Args:
        groups: in the order in which they shall be filled.
        plan: which they are parts of.
        give: what ``Request.into`` asks.
    """
    place = {name: number for number, name in enumerate(plan.manifest)}
    takes: dict[str, list[tuple[LayerGroup, Step, bool]]] = defaultdict(list)
    for group in groups:
        for name in sorted(group.sources, key=place.__getitem__):
            takes[name]  # Names in this order; what takes them follows.
        for step, at_once in _steps(group):
            for name in step.sources:
                takes[name].append((group, step, at_once))
    for name in plan.fallback:
        takes[name] = []
    return [_request(plan.manifest[name], steps, plan, give) for name, steps in takes.items()]


def _steps(group: LayerGroup) -> Iterator[tuple[Step, bool]]:
    """All that takes tensors; and whether it is done as they come, and by nothing but a copy."""
    first = min(group.plan.levels, default=0)
    levels = group.plan.levels or (first,) * len(group.plan.steps)
    for step, level in zip(group.plan.steps, levels, strict=True):
        yield step, level == first and isinstance(step, Copy)
    for pair in group.plan.ties:
        yield from ((step, False) for step in pair)


def _request(spec: TensorSpec, takes: list[tuple[LayerGroup, Step, bool]], plan: LoadPlan, give: Room) -> Request:
    ranges = ranges_read(spec, [step for _, step, _ in takes])
    into = None
    if len(takes) == 1:
        group, step, at_once = takes[0]
        if (
            at_once
            and isinstance(step, Copy)
            and (step.of is None or (range_of(step.of),) == ranges or _all(step, spec))
        ):
            into = partial(give, group, step)
    steps = [step for _, step, at_once in takes if at_once]  # What compares tied tensors does it by their bytes.
    return Request(spec.name, ranges, into, rounded_to(spec, steps, plan) if len(steps) == len(takes) else None)


def _all(step: Copy, spec: TensorSpec) -> bool:
    taken = None if step.of is None else range_of(step.of)
    return taken is not None and taken.count == 1 and taken.size == spec.nbytes


def room(step: Copy, spec: TensorSpec, destinations: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The bytes that the copy writes, ``uint8``; ``None`` where it does more than to put them one behind the other."""
    dtype = spec.dtype if step.of is None else step.of.dtype
    place = place_of(step, destinations).detach()
    if place.dtype != dtype or not place.is_cpu or not place.is_contiguous() or not place.numel():
        return None
    return place.view(-1).view(torch.uint8)
