"""Tracing a model's own loading code: what no plan can repeat is left out, and the rest is traced again."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence

import torch
from torch import nn

from ..boxes import Box, Region, meets
from ..dtypes import format_name
from ..errors import PlanError
from ..manifest import Manifest
from ..model.survey import LoadingCode, survey
from ..plan.draft import Traced
from ..plan.steps import GraphBreak, Step, read_too_early
from .fake_weight import line_of_the_error
from .lower import lower
from .record import Recording, record

_UNTOUCHED = (
    "It took no tensor. A load_weights is given an iterator of pairs of name and tensor; one that wants a dict begins "
    "with weights = dict(weights). "
    "If it does not take pairs, and the model's names and shapes are the checkpoint's, load by name: by=\"name\"."
)

_CPU = torch.device("cpu")


def trace_code(model: nn.Module, manifest: Manifest, load: LoadingCode) -> Traced:
    """Trace ``load`` until a run has no graph break, each time without the source tensors that broke the last one.

    With a tensor go all others of its layer, and of layers that are like it but for their number: the next run must
    not stop at those. If nothing is left, or the rest cannot be loaded apart from them, all is left to the model's own
    code.

    Raises:
        PlanError: the code fails, and nothing of ours is the reason.
    """
    left_out: set[str] = set()
    graph_breaks = _ByLine(manifest)
    while True:
        recording = record(model, manifest, load, device=_CPU, leave_out=left_out)
        error = recording.error
        if error is not None and not recording.graph_breaks and not left_out:
            raise PlanError(
                "the model's own loading code refuses this manifest; nothing was read or written",
                [_refusal(model, manifest, recording, error)],
                advice="" if recording.taken else _UNTOUCHED,
            ) from error
        steps = lower(recording.ops)
        if error is None and not recording.graph_breaks:
            break
        for graph_break in recording.graph_breaks:
            graph_breaks.add(graph_break, _concerned(manifest, [graph_break], steps) - left_out)
        if left_out >= set(manifest):  # It fails even without a tensor: it is not run on fake tensors at all.
            return _left_to_code(manifest, recording, graph_breaks.told())
        concerned = _concerned(manifest, recording.graph_breaks, steps) - left_out
        left_out |= concerned or set(manifest)
    if left_out:  # What was taken and not written may have been waiting for what was left out.
        left_out |= recording.taken - {name for _, step in steps for name in step.sources}
        if left_out >= set(manifest) or not _separable(model, manifest, load, recording, left_out):
            return _left_to_code(manifest, recording, graph_breaks.told())
    return Traced(
        steps,
        taken=recording.taken,
        constants=recording.constants,
        state_read=recording.state_read,
        side_effects=recording.side_effects,
        fallback=tuple(name for name in manifest if name in left_out),
        graph_breaks=tuple(graph_breaks.told()),
    )


def _refusal(model: nn.Module, manifest: Manifest, recording: Recording, error: Exception) -> str:
    """What the code raised, of which tensor, and what it found and expected, as far as that is known."""
    # A KeyError shows its key alone, which says as little as a line of code does without the other.
    said = f"{type(error).__name__}: {error} (at {line_of_the_error(error)})"
    if recording.refused is None or recording.refused[0] not in manifest:
        return said
    name, failed = recording.refused
    spec, own = manifest[name], survey(model).tensors.get(name)
    found = f"{format_name(spec.dtype)} {list(spec.shape)} found"
    if failed is not None and failed.into is not None:
        shape, destination = failed.into
        part = "" if failed.shape == list(spec.shape) else f", of which the code takes {failed.shape}"
        found = f"{shape} expected for {destination}, {found}{part}"
    elif own is not None and tuple(own.shape) != spec.shape:
        found = f"{format_name(own.dtype)} {list(own.shape)} expected, {found}"
    return f"{manifest.called(name)}: {found}; {said}"


class _ByLine:
    """Graph breaks, one for each line of code and what it does there: a line that breaks in each layer is told once."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._lines: dict[tuple[str, str], tuple[set[str], set[str]]] = {}

    def add(self, graph_break: GraphBreak, concerned: Iterable[str]) -> None:
        """Note one, and the source tensors that go to the model's own code because of it."""
        sources, all_told = self._lines.setdefault((graph_break.what, graph_break.where), (set(), set()))
        sources.update(graph_break.sources)
        all_told.update(concerned if graph_break.sources else ())

    def told(self) -> Iterator[GraphBreak]:
        """All of them, with names in the manifest's order."""
        for (what, where), (sources, all_told) in self._lines.items():
            ordered = tuple(name for name in self._manifest if name in sources)
            others = tuple(name for name in self._manifest if name in all_told - sources)
            yield GraphBreak(what, ordered, where, others)


def _left_to_code(manifest: Manifest, recording: Recording, graph_breaks: Iterable[GraphBreak]) -> Traced:
    """Nothing is planned: the model's own code gets every tensor."""
    return Traced((), side_effects=recording.side_effects, fallback=tuple(manifest), graph_breaks=tuple(graph_breaks))


def _separable(
    model: nn.Module, manifest: Manifest, load: LoadingCode, recording: Recording, left_out: Container[str]
) -> bool:
    """Whether loading some tensors by plan and the others by the model's code gives what loading all by its code gives.

    It does not where the code writes without being given a tensor (it would do so twice), or where what is planned
    reads what only the others write.
    """
    if recording.state_read & survey(model).persistent.keys():
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


def _concerned(manifest: Manifest, graph_breaks: Sequence[GraphBreak], steps: Sequence[tuple[int, Step]]) -> set[str]:
    """All source tensors of the layers where tracing broke, and of layers like them; all where no tensor is named."""
    asked = {name for graph_break in graph_breaks for name in graph_break.sources}
    if not asked:
        return set(manifest)
    written = {_layer(name) for _, step in steps if asked & set(step.sources) for name in step.destinations}
    layers = {_layer(name) for name in asked}
    for _, step in steps:
        if any(_layer(name) in written for name in step.destinations):
            layers |= {_layer(name) for name in step.sources}
    alike = {_numberless(layer) for layer in layers}
    return {name for name in manifest if _numberless(_layer(name)) in alike}


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)
