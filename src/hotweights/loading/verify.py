"""Verifier: the model's own loading code loads each layer once more, and bits are compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import nn

from ..errors import PlanDiffers, UsageError
from ..memory.pool import Pool
from ..model.snapshot import Snapshot
from ..model.survey import By, LoadingCode, Survey, by_name, loader_of, survey
from ..plan.disjoint_sets import DisjointSets
from ..plan.plan import LoadPlan
from ..signals import held
from ..sources.contracts import Addressed, InMemory, Source
from ..text import some
from ..tracing.frameworks import rules_for
from .copy_step import Destinations
from .execute import owned
from .ties import same_bits

Verify = Literal["off", "loader"]
"""Whether the model's own loading code (its "loader") proves a load."""


class Verifier:
    """Proves what a plan, or a part of one, has made.

    Attributes:
        proven: how many tensors of the model, so far.
    """

    def __init__(self, model: nn.Module, load: LoadingCode, source: Addressed | InMemory) -> None:
        self._model, self._load, self._source = model, load, source
        self.proven = 0

    def __call__(self, plan: LoadPlan, destinations: Destinations, pool: Pool) -> None:
        """See ``verify_by_loader``."""
        source = self._source
        read = partial(source.read, pool=pool) if isinstance(source, Addressed) else dict
        self.proven += verify_by_loader(plan, self._model, self._load, destinations, partial(owned, source, read=read))


def verifier(model: nn.Module, source: Source, by: By | None = None) -> Verifier:
    """What proves loads of ``source`` into ``model`` by the model's own loading code.

    Raises:
        UsageError: the source only streams; what was loaded from it cannot be had again.
    """
    check_verifiable(survey(model, by))
    load = rules_for(model, source.manifest).load or loader_of(model, by) or by_name(model)
    if not isinstance(source, (Addressed, InMemory)):
        raise UsageError(
            'verify="loader" needs a source that can be asked for a tensor twice, and this one only streams; '
            "load dict(source.tensors()) instead"
        )

    return Verifier(model, load, source)


def unprovable(plan: LoadPlan, proven: int) -> tuple[str, ...]:
    """A warning of what ``verify="loader"`` could not compare: nothing but the model's own code has loaded it."""
    if not plan.fallback:
        return ()
    return (
        f'verify="loader": proven {proven} of {proven + len(plan.unproven)} tensors of the model; the rest was loaded '
        "by the model's own code, with which nothing can be compared",
    )


def check_verifiable(seen: Survey) -> None:
    """See that the model's own loading code can write to what the survey found.

    Raises:
        UsageError: it cannot.
    """
    if seen.kept:
        raise UsageError(
            'verify="loader" runs the model\'s own loading code, which would write to meta tensors where hooks keep '
            f"the weights: {some(seen.kept)}; leave verify= out"
        )
    if seen.shells:
        raise UsageError(
            'verify="loader" gives the model\'s own loading code memory of its own, and there is none for tensors in '
            f"wrappers: {some(list(seen.shells))}; leave verify= out"
        )
    if parts := seen.parts:
        raise UsageError(
            'verify="loader" gives the model\'s own loading code whole tensors, and it takes none for DTensors: '
            f"{some(list(parts))}; leave verify= out"
        )


def verify_by_loader(
    plan: LoadPlan,
    model: nn.Module,
    load: LoadingCode,
    destinations: Mapping[str, torch.Tensor],
    own: Callable[[str], torch.Tensor],
) -> int:
    """Load each layer again by the model's own code, over poisoned memory, and compare it with what the plan made.

    One layer is copied at a time; layers that share source tensors, together. Attributes that the loading code
    changes are put back.

    Args:
        plan: was followed just now.
        model: holds its result.
        load: the model's own loading code; it gets the tensors of one layer at a time.
        destinations: the model's tensors by name.
        own: gives a source tensor, owned.

    Returns:
        How many tensors of the model are proven.

    Raises:
        PlanDiffers: names every tensor that differs; those hold what the model's own code made.
    """
    differing: list[str] = []
    proven = 0
    for group in _groups(plan):
        proven += len(group.destinations)
        snapshot = Snapshot(model)
        try:
            differing += _verify(group, load, destinations, own)
        finally:
            snapshot.put_back()
    if differing:
        raise PlanDiffers("the plan's result is not what the model's own loading code makes", differing)
    return proven


class _Group(NamedTuple):
    """Layers that share source tensors."""

    sources: list[str]
    destinations: list[str]


@held  # Else a signal might leave autograd off.
def _verify(
    group: _Group, load: LoadingCode, destinations: Mapping[str, torch.Tensor], own: Callable[[str], torch.Tensor]
) -> Iterator[str]:
    tensors = {name: destinations[name].detach() for name in group.destinations}
    planned = {name: tensor.clone() for name, tensor in tensors.items()}
    with torch.no_grad():
        for tensor in tensors.values():
            poison = torch.full((tensor.nbytes,), 0xFF, dtype=torch.uint8, device=tensor.device)
            tensor.copy_(poison.view(tensor.dtype).view(tensor.shape))
        load((name, own(name)) for name in group.sources)
        for name, tensor in tensors.items():
            if same_bits(tensor, planned[name]):
                tensor.copy_(planned[name])
            else:
                yield name


def _groups(plan: LoadPlan) -> Iterator[_Group]:
    sources: dict[str, None] = {}
    destinations: dict[str, None] = {}
    sets = DisjointSets()
    for step in plan.steps:
        if not step.sources:
            continue  # It writes constants: the loading code, given no tensor of the source, would not write them.
        sources.update(dict.fromkeys(step.sources))
        destinations.update(dict.fromkeys(step.destinations))
        sets.join([*map(_source, step.sources), *map(_layer, step.destinations)])
    groups: dict[str, _Group] = defaultdict(lambda: _Group([], []))
    for name in sources:
        groups[sets.of(_source(name))].sources.append(name)
    for name in destinations:
        groups[sets.of(_layer(name))].destinations.append(name)
    yield from groups.values()


def _source(name: str) -> str:
    return f"source {name}"


def _layer(name: str) -> str:
    """The layer of a model's tensor, told apart from a source tensor of the same name."""
    return f"layer {name.rpartition('.')[0]}"
