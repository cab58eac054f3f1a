"""``trace``: the plan of loading a manifest into a model. It chooses how to find out; it reads and writes nothing."""

from __future__ import annotations

import os
import re
import types
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .aliases import overlaps
from .arguments import check_model, device_from, patterns_from
from .casts import Cast
from .collection import without_collection
from .drafting import draft
from .engines import rules_for
from .errors import PlanError
from .fit import complete
from .lowering import lower
from .manifest import Manifest
from .modules import Survey, counters, extra_state_problems, hook_problems, places, survey, targets_of
from .plan import Copy, LoadPlan, Note, Patterns, Step, both, matches
from .regions import Box, Region, meets
from .sources import Source
from .sources import open as open_source
from .steps import read_too_early
from .tracing import Recording, record

__all__ = ["by_name", "loader_of", "trace"]

Loader = Callable[[Iterable[tuple[str, torch.Tensor]]], object]
_CPU = torch.device("cpu")


def trace(
    model: nn.Module,
    manifest: Manifest | str | os.PathLike[str] | Mapping[str, torch.Tensor] | nn.Module | Source,
    *,
    device: torch.device | str | None = None,
    allow_missing: Patterns = (),
    allow_partial: Patterns = (),
    allow_unexpected: Patterns = (),
    cast: Cast | None = None,
) -> LoadPlan:
    """Plan the loading of ``manifest`` into ``model``: run the model's own loading code on stand-ins and record it.

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


def _promised(source: Any) -> Manifest:
    if isinstance(source, Manifest):
        return source
    if isinstance(source, Source):
        return source.manifest
    with open_source(source) as opened:
        manifest: Manifest = opened.manifest
    return manifest


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
        notes=() if traced is None else traced.notes,
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


def loader_of(model: nn.Module) -> Loader | None:
    """The model's own loading code; ``None`` where loading by name is all that it would do."""
    if hasattr(model, "load_weights"):
        return lambda pairs: _drained(model.load_weights(pairs))  # type: ignore[operator]
    if any(map(nn.parameter.is_lazy, survey(model).tensors.values())):
        return None  # Loading code would make them real.
    return by_name(model) if any(hook_problems(model)) else None


def _drained(result: object) -> object:
    """Loading code that yields does nothing until somebody asks for what it yields."""
    if isinstance(result, types.GeneratorType):
        deque(result, maxlen=0)
    return result


def by_name(model: nn.Module) -> Loader:
    """``load_state_dict`` as loading code."""
    return lambda pairs: model.load_state_dict(dict(pairs), strict=False)


class _Traced(NamedTuple):
    """What tracing gave in the end.

    Attributes:
        recording: the last run, in which nothing was asked for that a stand-in does not have.
        steps: its steps, with levels.
        fallback: names of tensors that were left out of it, because they must be loaded by the model's own code.
        notes: why.
    """

    recording: Recording
    steps: list[tuple[int, Step]]
    fallback: tuple[str, ...]
    notes: tuple[Note, ...]

    @classmethod
    def of(cls, model: nn.Module, manifest: Manifest, load: Loader) -> _Traced:
        """Trace; leave out what cannot be planned, with all that its layers need, and trace again until all can be."""
        left_out: set[str] = set()
        notes: list[Note] = []
        while True:
            recording = record(model, manifest, load, device=_CPU, leave_out=left_out)
            if not recording.notes and recording.error is None:
                steps = lower(recording.ops)
                written = {name for _, step in steps for name in _sources(step)}
                if left_out:  # What its siblings were left out of may have been waiting for them.
                    left_out |= {name for name in recording.taken if name not in written}
                    if not _separable(model, manifest, load, recording, left_out):
                        left_out = set(manifest)
                if manifest and left_out >= set(manifest):
                    return cls._nothing(recording, manifest, notes)
                return cls(recording, steps, tuple(name for name in manifest if name in left_out), tuple(notes))
            if not recording.notes and not left_out:
                assert recording.error is not None
                raise PlanError(
                    "the model's own loading code refuses this manifest", [_words(recording.error)]
                ) from recording.error
            notes += (note for note in recording.notes if note not in notes)
            if left_out >= set(manifest):  # It fails even without a tensor: it is not run on stand-ins at all.
                return cls._nothing(recording, manifest, notes)
            left_out |= _left_out(manifest, recording) - left_out or set(manifest)

    @classmethod
    def _nothing(cls, recording: Recording, manifest: Manifest, notes: list[Note]) -> _Traced:
        nothing = recording._replace(ops=[], constants={}, taken=frozenset(), state_read=frozenset())
        return cls(nothing, [], tuple(manifest), tuple(notes))


def _separable(
    model: nn.Module, manifest: Manifest, load: Loader, recording: Recording, left_out: Container[str]
) -> bool:
    """Whether loading some tensors by plan and the others by the model's code gives what loading all by its code gives.

    It does not where the code writes without being given a tensor (it would do so twice), or where what is planned
    reads what only the others write.
    """
    loadable = {place.name for place in places(model) if place.persistent}
    if recording.state_read & loadable:
        return False
    written: dict[str, list[Box]] = defaultdict(list)
    if read_too_early(recording.ops, written):
        return False
    alone = record(model, manifest, load, device=_CPU, leave_out=manifest)
    if alone.error is not None or alone.notes or any(_model_writes(alone)):
        return False
    # As far as it comes: at the first value that it asks for it may stop.
    others = record(model, manifest, load, device=_CPU, leave_out={name for name in manifest if name not in left_out})
    if others.error is not None and not others.notes:
        return False
    return not any(meets(region.box, box) for region in _model_writes(others) for box in written[region.memory.name])


def _model_writes(recording: Recording) -> Iterator[Region]:
    return (region for op in recording.ops for region in op.writes if region.memory.kind == "model")


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _left_out(manifest: Manifest, recording: Recording) -> set[str]:
    """Names of all tensors of the layers concerned, and of layers like them: the next trace must not stop at those."""
    asked = {name for note in recording.notes for name in note.sources}
    if not asked:
        return set(manifest)
    concerned = {_layer(name) for name in asked}
    layers = {
        _layer(name) for _, step in lower(recording.ops) if asked & set(_sources(step)) for name in _destinations(step)
    }
    for _, step in lower(recording.ops):
        if any(_layer(name) in layers for name in _destinations(step)):
            concerned |= {_layer(name) for name in _sources(step)}
    patterns = {_numberless(layer) for layer in concerned}
    return {name for name in manifest if _numberless(_layer(name)) in patterns}


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _sources(step: Step) -> tuple[str, ...]:
    return (step.source,) if isinstance(step, Copy) else step.sources


def _destinations(step: Step) -> tuple[str, ...]:
    return (step.destination,) if isinstance(step, Copy) else tuple(region.memory.name for region in step.writes)


def _left_on_meta(found: Survey, allowed: Patterns) -> list[str]:
    may_stay = matches(allowed)
    return [
        f"{name}: is a non-persistent buffer on the meta device, and no checkpoint carries it; build the model "
        "with real buffers, or allow it with allow_missing= and fill it yourself"
        for name in found.transient
        if found.tensors[name].is_meta and not may_stay(name)
    ]
