"""``trace``: the plan of loading a manifest into a model. It chooses how to find out; it reads and writes nothing."""

from __future__ import annotations

import torch
from torch import nn

from ..arguments import check_model, device_from, patterns_from
from ..dtypes import Cast
from ..errors import PlanError
from ..gc_pause import without_collection
from ..manifest import Manifest
from ..memory.aliases import overlaps
from ..model.places import targets_of
from ..model.survey import Survey, counters, extra_state_problems, loader_of, survey
from ..plan.draft import draft
from ..plan.patterns import Patterns, both, matches
from ..plan.plan import LoadPlan
from ..sources.iterator import IteratorSource
from ..sources.opening import AnySource, opened
from .fit import complete
from .frameworks import rules_for
from .leave_out import _Traced


def trace(
    model: nn.Module,
    manifest: Manifest | AnySource,
    *,
    device: torch.device | str | None = None,
    allow_missing: Patterns = (),
    allow_partial: Patterns = (),
    allow_unexpected: Patterns = (),
    cast: Cast | None = None,
) -> LoadPlan:
    """Plan the loading of ``manifest`` into ``model``: run the model's own loading code on fake tensors and record it.

    A model with ``load_weights`` is asked by that; a transformers model by transformers' own conversions; any other is
    planned by name, or by its ``load_state_dict`` where that runs code of its own. Moves nothing, changes nothing: no
    tensor of the model is written, and attributes that its code changes are put back.

    Args:
        model: whose loading is planned.
        manifest: what a source promises; or a source, or anything that ``hotweights.open`` takes.
        device: where meta tensors will be made real. Without it they are a problem.
        allow_missing: names of the model that may stay as they are.
        allow_partial: names of the model of which some bytes may stay as they are.
        allow_unexpected: tensors of the manifest that may have no place.
        cast: whether casts that lose information are problems (``"error"``, the default by name) or meant
            (``"loader"``, the default for models with loading code of their own).

    Raises:
        PlanError: with every problem.
        UsageError: an argument is of the wrong kind.
    """
    check_model(model, manifest)
    missing, partly, unexpected = patterns_from(
        allow_missing=allow_missing, allow_partial=allow_partial, allow_unexpected=allow_unexpected
    )
    where = device_from(device)
    with without_collection():
        return _trace(model, _promised(manifest), where, missing, partly, unexpected, cast)


def _promised(source: Manifest | AnySource) -> Manifest:
    if isinstance(source, Manifest):
        return source
    if isinstance(source, IteratorSource):  # Without a manifest it says what to pass; to collect would use it up.
        return source.manifest
    with opened(source) as promising:
        return promising.manifest


def _trace(
    model: nn.Module,
    manifest: Manifest,
    where: torch.device | None,
    allow_missing: Patterns,
    allow_partial: Patterns,
    allow_unexpected: Patterns,
    cast: Cast | None,
) -> LoadPlan:
    rules = rules_for(model, manifest)
    found = survey(model)
    transient = set(found.transient)
    tensors = {name: tensor for name, tensor in found.tensors.items() if name not in transient}
    own_code = hasattr(model, "load_weights")
    absent = [] if own_code else counters(model, sorted(tensors.keys() - manifest.keys()))
    may_miss = both(both(allow_missing, rules.allow_missing), absent)
    loader = None if found.plain or rules.steps is not None else loader_of(model)
    problems: list[str] = []
    traced = None
    if loader is not None:
        try:
            traced = _Traced.of(model, manifest, loader)
        except PlanError as error:
            if own_code:
                raise
            # By name every misfit is found and named, where load_state_dict stops at a summary.
            problems += error.problems
    plan = draft(
        manifest,
        targets_of(tensors, where),
        steps=rules.steps if traced is None else traced.steps,
        zeroed=[name for name in absent if tensors[name].is_meta and where is not None and traced is None],
        taken=frozenset() if traced is None else traced.recording.taken,
        skip=rules.skip,
        allow_missing=may_miss,
        allow_partial=allow_partial,
        allow_unexpected=allow_unexpected,
        cast=cast or ("loader" if own_code else "error"),
        overlapping=overlaps(tensors),
        constants=rules.constants if traced is None else traced.recording.constants,
        fallback=() if traced is None else traced.fallback,
        graph_breaks=() if traced is None else traced.graph_breaks,
        side_effects=() if traced is None else traced.recording.side_effects,
        state_read=() if traced is None else traced.recording.state_read,
        problems=[
            *problems,
            *rules.problems,
            *(() if own_code or found.plain else extra_state_problems(model)),
            *(_left_on_meta(found, may_miss) if where is not None else ()),
        ],
    )
    return complete(plan, model)


def _left_on_meta(found: Survey, allowed: Patterns) -> list[str]:
    may_stay = matches(allowed)
    return [
        f"{name}: is a non-persistent buffer on the meta device, and no checkpoint carries it; build the model "
        "with real buffers, or allow it with allow_missing= and fill it yourself"
        for name in found.transient
        if found.tensors[name].is_meta and not may_stay(name)
    ]
