"""Whether a plan that was made earlier fits: the source, the model's tensors, and the values that it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from ..errors import PlanError
from ..manifest import Manifest
from ..memory.digest import digests
from ..model.places import targets_of
from ..model.reachable import reachable
from ..model.survey import survey
from ..plan.plan import LoadPlan


def complete(plan: LoadPlan, model: nn.Module) -> LoadPlan:
    """The plan with what only ``model`` knows: digests of the values that were read, and the tensors in attributes."""
    written = {name for step in plan.steps for name in step.destinations}
    unnamed = written - plan.targets.keys()
    if not unnamed and not plan.state_read:
        return plan
    reached = reachable(model)
    others = targets_of({name: reached[name] for name in sorted(unnamed) if name in reached}, None)
    return replace(plan, targets={**plan.targets, **others}, digests=digests(reached, plan.state_read))


def _swapped(plan: LoadPlan, manifest: Manifest) -> Iterator[str]:
    """Where the plan takes a tensor by its name before ``rename=``, and that name is another tensor's now."""
    now = {manifest.origins.get(name, name): name for name in manifest} if plan.manifest.origins else {}
    for name, origin in plan.manifest.origins.items():
        if now.get(origin, name) != name:
            yield f"source: {name}: the plan takes it from {origin}, by rename=; give the same rename= again"


def check(plan: LoadPlan, model: nn.Module, manifest: Manifest, device: torch.device | None) -> None:
    """Check that the plan was made for this model and this manifest.

    Raises:
        PlanError: with every difference.
    """
    surveyed = survey(model)
    targets = targets_of(surveyed.persistent, device, surveyed.parts, surveyed.shells)
    reached: Mapping[str, torch.Tensor] = {}
    if not plan.targets.keys() <= targets.keys() or plan.state_read:
        reached = reachable(model)
        unnamed = [name for name in plan.targets if name not in targets and name in reached]
        targets |= targets_of({name: reached[name] for name in unnamed}, None)
    problems = plan.differences(manifest, targets)
    problems += _swapped(plan, manifest)
    values = digests(reached, plan.state_read)
    problems += [
        f"model: {name}: holds other values, from which the plan was made"
        for name, digest in plan.digests.items()
        if values.get(name) != digest
    ]
    if problems:
        raise PlanError("the plan was made for another source or another model; nothing was read or written", problems)
