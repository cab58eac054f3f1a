"""What a load asks of its source: which bytes of which tensor, and how many in all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

import torch

from ..manifest import Manifest, TensorSpec
from ..plan.plan import LoadPlan
from ..plan.steps import Copy, Step
from ..ranges import Range, ranges_of
from ..sources.contracts import Addressed, InMemory, Participant, Request, Source
from .reads import read_nbytes


def bytes_to_read(plan: LoadPlan, source: Source) -> int:
    """How many bytes will arrive from ``source`` while ``plan`` is done: the total of a progress bar.

    A file read in pieces, because its short runs do not fit a slot of the pool, gives a little less.
    """
    manifest = plan.manifest
    if not isinstance(source, (Addressed, InMemory)):
        return sum(request_nbytes(request, manifest) for request in requests_of(plan, source))
    nbytes = sum(manifest[name].nbytes for name in plan.fallback)
    if isinstance(source, InMemory):
        return nbytes + sum(used_nbytes(step, manifest) for step in plan.steps)
    compared = sum(manifest[step.source].nbytes for step in chain.from_iterable(plan.ties))
    for step in plan.steps:
        if isinstance(step, Copy):
            nbytes += read_nbytes(step, manifest[step.source])
        else:
            nbytes += used_nbytes(step, manifest)
    return nbytes + compared


def used_nbytes(step: Step, manifest: Manifest) -> int:
    """Bytes of its sources that a step uses. A program uses whole tensors."""
    if isinstance(step, Copy):
        return manifest[step.source].nbytes if step.of is None else step.of.nbytes
    return sum(manifest[name].nbytes for name in step.sources)


def requests_of(plan: LoadPlan, source: Source) -> list[Request]:
    """A request for each tensor that the plan needs of a stream, in the plan's order.

    A source that can choose, a ``Participant``, is asked only for the bytes that the steps read; others send all.
    """
    steps: dict[str, list[Step]] = defaultdict(list)
    for step in (*plan.steps, *chain.from_iterable(plan.ties)):
        for name in step.sources:
            steps[name].append(step)
    for name in plan.fallback:
        steps[name] = []
    chooses = isinstance(source, Participant)
    if not chooses:
        return [Request(name) for name in steps]
    compared = {name for step in chain.from_iterable(plan.ties) for name in step.sources}
    return [
        Request(
            name,
            ranges_read(plan.manifest[name], steps[name]),
            rounded=None if name in compared else rounded_to(plan.manifest[name], steps[name], plan),
        )
        for name in steps
    ]


def rounded_to(spec: TensorSpec, steps: Sequence[Step], plan: LoadPlan) -> torch.dtype | None:
    """The one dtype to which all of ``steps`` cast a tensor, where that is a smaller one; ``None`` otherwise."""
    own, found = spec.dtype, set()
    if not isinstance(own, torch.dtype) or not own.is_floating_point or spec.shell or spec.part is not None:
        return None
    for step in steps:
        if not isinstance(step, Copy) or (step.of is not None and step.of.dtype != own):
            return None
        target = plan.targets.get(step.destination)
        if target is None or (step.into is not None and step.into.dtype != target.spec.dtype):
            return None
        found.add(target.spec.dtype)
    dtype = found.pop() if len(found) == 1 else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or not 1 < dtype.itemsize < own.itemsize:
        return None
    return dtype


def ranges_read(spec: TensorSpec, steps: Sequence[Step]) -> tuple[Range, ...] | None:
    """The bytes of one source tensor that ``steps`` read; ``None`` for all of them.

    Copies read slices; programs, and the model's own code (no steps at all), need the whole tensor.
    """
    boxes = [step.of for step in steps if isinstance(step, Copy) and step.of is not None]
    if not boxes or len(boxes) < len(steps):
        return None
    ranges = ranges_of(boxes)
    return None if sum(part.size for part in ranges) in (0, spec.nbytes) else ranges


def request_nbytes(request: Request, manifest: Manifest) -> int:
    """How many bytes a request asks for."""
    return manifest[request.name].nbytes if request.ranges is None else sum(part.size for part in request.ranges)
