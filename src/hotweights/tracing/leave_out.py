"""Tracing again without what cannot be planned."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterator
from typing import NamedTuple

import torch
from torch import nn

from ..boxes import Box, Region, meets
from ..errors import PlanError
from ..manifest import Manifest
from ..model.places import places
from ..model.survey import LoadingCode
from ..plan.steps import Copy, GraphBreak, Step, read_too_early
from .lower import lower
from .record import Recording, record

_CPU = torch.device("cpu")


class _Traced(NamedTuple):
    """What tracing gave in the end.

    Attributes:
        recording: the last run, in which nothing was asked for that a fake tensor does not have.
        steps: its steps, with levels.
        fallback: names of tensors that were left out of it, because they must be loaded by the model's own code.
        graph_breaks: why.
    """

    recording: Recording
    steps: list[tuple[int, Step]]
    fallback: tuple[str, ...]
    graph_breaks: tuple[GraphBreak, ...]

    @classmethod
    def of(cls, model: nn.Module, manifest: Manifest, load: LoadingCode) -> _Traced:
        """Trace; leave out what cannot be planned, with all that its layers need, and trace again until all can be."""
        left_out: set[str] = set()
        graph_breaks: list[GraphBreak] = []
        while True:
            recording = record(model, manifest, load, device=_CPU, leave_out=left_out)
            if not recording.graph_breaks and recording.error is None:
                steps = lower(recording.ops)
                written = {name for _, step in steps for name in step.sources}
                if left_out:  # What its siblings were left out of may have been waiting for them.
                    left_out |= {name for name in recording.taken if name not in written}
                    if not _separable(model, manifest, load, recording, left_out):
                        left_out = set(manifest)
                if manifest and left_out >= set(manifest):
                    return cls._nothing(recording, manifest, graph_breaks)
                return cls(recording, steps, tuple(name for name in manifest if name in left_out), tuple(graph_breaks))
            if not recording.graph_breaks and not left_out:
                assert recording.error is not None
                raise PlanError(
                    "the model's own loading code refuses this manifest", [_words(recording.error)]
                ) from recording.error
            graph_breaks += (note for note in recording.graph_breaks if note not in graph_breaks)
            if left_out >= set(manifest):  # It fails even without a tensor: it is not run on fake tensors at all.
                return cls._nothing(recording, manifest, graph_breaks)
            left_out |= _left_out(manifest, recording) - left_out or set(manifest)

    @classmethod
    def _nothing(cls, recording: Recording, manifest: Manifest, graph_breaks: list[GraphBreak]) -> _Traced:
        nothing = recording._replace(ops=[], constants={}, taken=frozenset(), state_read=frozenset())
        return cls(nothing, [], tuple(manifest), tuple(graph_breaks))


def _separable(
    model: nn.Module, manifest: Manifest, load: LoadingCode, recording: Recording, left_out: Container[str]
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
    if alone.error is not None or alone.graph_breaks or any(_model_writes(alone)):
        return False
    # As far as it comes: at the first value that it asks for it may stop.
    others = record(model, manifest, load, device=_CPU, leave_out={name for name in manifest if name not in left_out})
    if others.error is not None and not others.graph_breaks:
        return False
    return not any(meets(region.box, box) for region in _model_writes(others) for box in written[region.memory.name])


def _model_writes(recording: Recording) -> Iterator[Region]:
    return (region for op in recording.ops for region in op.writes if region.memory.kind == "model")


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _left_out(manifest: Manifest, recording: Recording) -> set[str]:
    """Names of all tensors of the layers concerned, and of layers like them: the next trace must not stop at those."""
    asked = {name for note in recording.graph_breaks for name in note.sources}
    if not asked:
        return set(manifest)
    concerned = {_layer(name) for name in asked}
    layers = {
        _layer(name) for _, step in lower(recording.ops) if asked & set(step.sources) for name in step.destinations
    }
    for _, step in lower(recording.ops):
        if any(_layer(name) in layers for name in step.destinations):
            concerned |= {_layer(name) for name in step.sources}
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
