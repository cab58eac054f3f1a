"""Plans: the plans by which one live model is loaded. Another manifest is traced anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import signals
from ..boxes import covered
from ..dtypes import Cast, format_name
from ..errors import PlanError
from ..manifest import Manifest
from ..memory.aliases import has_bytes
from ..memory.digest import digests
from ..model.materialise import dressed
from ..model.places import places
from ..model.processed import forget, note
from ..model.reachable import reachable
from ..model.survey import By, own_loader, survey
from ..plan.draft import LACKS
from ..plan.patterns import Patterns, both, matches
from ..plan.plan import LoadPlan
from ..plan.steps import Fate
from ..text import some
from ..tracing.trace import trace
from .groups import Coverage, LayerGroup, coverage, elements, groups_of, needs_initial
from .layers import Dressing, Layer, contents, modules_held, put_back
from .layout import MemoryLayout, Mirror
from .optional import OptionalTensors

_STRICT: tuple[Cast, ...] = ("error", "floats", "loader")  # The first do less.
_KEPT = 4  # several manifests take turns, none of them for long


@dataclass(frozen=True)
class Options:
    """What every load of one model allows, see ``hotweights.load``."""

    allow_missing: Patterns = ()
    allow_partial: Patterns = ()
    allow_unexpected: Patterns = ()
    cast: Cast | None = None
    allow_mismatched: Patterns = ()
    by: By | None = None

    def for_update(self, model: nn.Module, cast: Cast | None) -> Cast:
        """Which casts an update does, if it is asked for ``cast``."""
        # The first load filled the model in the dtypes that its engine wants: float masters are cast to them.
        return cast or self.cast or ("floats" if own_loader(model, self.by) is None else "loader")

    def traced(
        self,
        model: nn.Module,
        manifest: Manifest,
        device: torch.device | None,
        may: Patterns = (),
        cast: Cast | None = None,
    ) -> LoadPlan:
        """The plan for ``manifest``; tensors that match ``may`` may be missing or partial besides."""
        return trace(
            model,
            manifest,
            device=device,
            allow_missing=both(self.allow_missing, may),
            allow_partial=both(self.allow_partial, may),
            allow_unexpected=self.allow_unexpected,
            allow_mismatched=self.allow_mismatched,
            cast=cast or self.cast,
            by=self.by,
        )


class Found(NamedTuple):
    """The work of one update.

    Attributes:
        plan: the plan.
        in_place: the group that is written in place.
        groups: those that need scratch.
        restored: names of tensors that it does not bring, and that get their values from before the first load.
        kept: names of the model's tensors that ``only=`` leaves alone.
        cast: which casts it does; ``None`` for the first load.
        warnings: what a person should read of what comes.
    """

    plan: LoadPlan
    in_place: LayerGroup
    groups: list[LayerGroup]
    restored: frozenset[str]
    kept: frozenset[str]
    cast: Cast | None
    warnings: tuple[str, ...] = ()


class Plans:
    """The plan of the first load, and the last few that were made since.

    Attributes:
        first: the plan of the first load. Every update writes exactly what that one writes, but for what is optional.
        covers: which boxes of the model's tensors that are.
        optional: what may be in one version and not in another.
    """

    def __init__(
        self,
        model: nn.Module,
        first: LoadPlan,
        options: Options,
        layers: Sequence[Layer],
        layout: MemoryLayout,
        unknown: Collection[str] = (),
    ) -> None:
        self.first = first
        self.covers = coverage(first)
        self._model = model
        self._options = options
        self._layers = layers
        self._layout = layout
        self._kept: list[tuple[LoadPlan, Cast]] = [
            (first, options.cast or ("error" if own_loader(model, options.by) is None else "loader"))
        ]
        self._parts: list[tuple[Patterns, LoadPlan, Cast]] = []  # of partial updates, by what only= was
        may_lack = both(options.allow_missing, options.allow_mismatched)
        self.optional = OptionalTensors(model, first, may_lack, layout, unknown)

    @property
    def last(self) -> LoadPlan:
        """The plan by which the live version came."""
        return self._kept[0][0]

    def initial(self) -> set[str]:
        """Names of the tensors whose values from before the first load updates need."""
        in_place, groups = groups_of(self.first, self._layers, self._layout)
        return self._initial(self.first, in_place, groups) | self.optional.names

    def committed(self, plan: LoadPlan, restored: Collection[str]) -> None:
        """Take note that a version came by this plan: the next one does too, unless it brings another manifest."""
        self.optional.came(plan, coverage(plan), restored)
        self._kept.sort(key=lambda kept: kept[0] is not plan)

    def kept(self) -> Callable[[], None]:
        """What makes these be as they are now, when a later version is taken back."""
        last, brought = self._kept[0], set(self.optional.brought)

        def put_back() -> None:
            self.optional.brought = brought
            self._kept = [last, *(kept for kept in self._kept if kept is not last)][:_KEPT]

        return put_back

    def find(
        self,
        manifest: Manifest | None,
        only: Patterns | None,
        live: Mapping[str, torch.Tensor],
        cast: Cast | None = None,
        *,
        alone: Callable[[], AbstractContextManager[None]],
    ) -> Found:
        """The plan for a manifest, and its groups. A plan that is kept is found while others read the model.

        Args:
            manifest: what will come; by default what the live version came by.
            only: names of the model's tensors that are updated, and no others.
            live: every live tensor by name.
            cast: which casts are done; by default those of the first load, or of floats.
            alone: inside, nobody reads the model: to make a plan, its loading code is run.

        Raises:
            PlanError: it lists everything that does not fit.
        """
        casts = self._options.for_update(self._model, cast)
        plan = self._whole(self.last.manifest if manifest is None else manifest, only, live, casts, alone)
        if only is None:
            groups = groups_of(plan, self._layers, self._layout)
            absent = self.optional.absent(plan, coverage(plan))
            return Found(plan, *groups, absent, frozenset(), casts, tuple(_other_sizes(self.first, plan)))
        chosen = _chosen(self.first, only)
        kept = frozenset(name for name in self.first.targets if not chosen(name))
        plan = _restricted(plan, only, kept)
        if manifest is None:
            used = {name for step in plan.steps for name in step.sources}
            plan = replace(plan, manifest=Manifest(spec for spec in plan.manifest.values() if spec.name in used))
        in_place, concerned = groups_of(plan, self._layers, self._layout)
        told = tuple(_other_sizes(self.first, plan))
        return Found(plan, in_place, self._concerned(concerned, plan, only), frozenset(), kept, casts, told)

    def _whole(
        self,
        manifest: Manifest,
        only: Patterns | None,
        live: Mapping[str, torch.Tensor],
        cast: Cast,
        alone: Callable[[], AbstractContextManager[None]],
    ) -> LoadPlan:
        parts = [(plan, allowed) for of, plan, allowed in self._parts if of == only]
        for plan, allowed in self._kept if only is None else (*parts, *self._kept):
            if plan.casts and _STRICT.index(allowed) > _STRICT.index(cast):
                continue  # It may do casts that are not asked for.
            same = plan.manifest is manifest or list(plan.manifest.values()) == list(manifest.values())
            if same and (not plan.state_read or self._is_as_read(plan, alone)):
                return plan
        may: list[str] = []
        if only is not None:
            chosen = _chosen(self.first, only)
            may = [name for name in self.first.targets if not chosen(name)]
        with alone(), self._in_checkpoint_format(live), _telling_what_was(self.last, manifest):
            meta = {name for name, tensor in survey(self._model).tensors.items() if tensor.is_meta}
            unloaded = meta - {name for name in self.first.targets if elements(self.covers, self.first, name)}
            plan = self._options.traced(self._model, manifest, torch.device("cpu"), [*may, *unloaded], cast)
        if only is None:
            self._check(plan)
            self._kept = [self._kept[0], (plan, cast), *self._kept[1:]][:_KEPT]
        else:
            self._parts = [(only, plan, cast), *self._parts][:_KEPT]
        return plan

    def _is_as_read(self, plan: LoadPlan, alone: Callable[[], AbstractContextManager[None]]) -> bool:
        """Whether the model's tensors hold what its loading code read of them when this plan was made.

        But for those that the plan writes: each version begins with what they held before the first load.
        """
        written = _written_after_a_read(plan)
        read = [name for name in plan.state_read if name not in written]
        with alone():
            now = digests(reachable(self._model), read)
        return now == {name: plan.digests[name] for name in read if name in plan.digests}

    def _check(self, plan: LoadPlan) -> None:
        """See that an update writes what the first load wrote, and reads only initial values that were kept."""
        covers = coverage(plan)
        problems = [
            self._unlike(name, plan, covers)
            for name in self.covers.keys() | covers.keys()
            if not _same(self.covers, covers, name, plan if name in plan.targets else self.first)
            and not self.optional.may_differ(name, plan)
        ]
        early = self._initial(plan, *groups_of(plan, self._layers, self._layout)) - self.initial()
        early |= _written_after_a_read(plan)
        problems += [f"{name}: is read as it was before the first load, which is not known any more" for name in early]
        if problems:
            raise PlanError("this would not write what the first load wrote", problems)

    def _unlike(self, name: str, plan: LoadPlan, covers: Coverage) -> str:
        now, then = elements(covers, plan, name), elements(self.covers, self.first, name)
        cure = "" if now and then else self.optional.refusal(name, plan)
        return f"{name}: {now} elements would be written, not the {then} that the first load wrote{cure}"

    def _initial(self, plan: LoadPlan, in_place: LayerGroup, groups: Sequence[LayerGroup]) -> set[str]:
        covers = coverage(plan)
        return {name for group in (in_place, *groups) for name in needs_initial(plan, group, covers, self._layout)}

    def _concerned(self, groups: list[LayerGroup], plan: LoadPlan, only: Patterns) -> list[LayerGroup]:
        """The groups that a partial update concerns. All their tensors must come, and all that ``only`` matches."""
        concerned = [group for group in groups if group.plan.steps]
        covers = coverage(plan)
        chosen = _chosen(self.first, only)
        inside = {name: group for group in concerned for name in group.names}
        lacking = []
        for name in self.covers.keys() | self.optional.brought:
            asked = chosen(name) or (name in inside and self.optional.is_needed(name))
            optional = name in self.optional.names
            if asked and not (name in covers if optional else _same(self.covers, covers, name, self.first)):
                why = "nothing that comes writes what only= asks for"
                if name in inside:
                    why = f"layer {inside[name].name} is processed as one, so an update of a part must bring this too"
                lacking.append(f"{name}: {why}")
        if not lacking and not plan.steps:
            match = matches(only)
            into = [name for step in self.first.steps if any(map(match, step.sources)) for name in step.destinations]
            told = f"; what it matches in the source goes into {some(list(dict.fromkeys(into)), 3)}" if into else ""
            lacking = [f"only={only!r} matches no tensor that the first load wrote{told}"]
        if lacking:
            raise PlanError("only= asks for what cannot be updated alone", lacking)
        return concerned

    @contextmanager
    @signals.held
    def _in_checkpoint_format(self, live: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside, layers are in checkpoint format: over live memory that still has that format, else on meta."""
        if not self._layers:
            yield
            return
        before = [(module, contents(module)) for module in modules_held(self._model)]
        twins = Mirror(self._layout, lambda nbytes, device: torch.empty(nbytes, dtype=torch.uint8, device="meta"))
        own = {name for layer in self._layers for name in layer.captured()}
        spans = {self._layout.of(name) for name in own}
        as_before = {span for span in spans if self._is_as_before(span, live)}

        def scratch(name: str) -> torch.Tensor:
            return live[name].detach() if self._layout.of(name) in as_before else twins[name]

        dressing: Dressing = {}
        processed = forget(layer.module for layer in self._layers)
        try:
            for place in places(self._model):
                if place.name not in own and place.name in self._layout and self._layout.of(place.name) in spans:
                    place.put(dressed(scratch(place.name), place.tensor))
            for layer in self._layers:
                layer.open(scratch, dressing)
            yield
        finally:
            put_back(before)
            note(processed)

    def _is_as_before(self, span: int, live: Mapping[str, torch.Tensor]) -> bool:
        """Whether the tensors of a span lie in live memory as they did before the first load."""
        names = self._layout.names(span)
        if any(name not in live or not has_bytes(live[name]) for name in names):
            return False
        first = live[names[0]].data_ptr() - self._layout.box(names[0]).offset
        boxes = ((live[name], self._layout.box(name)) for name in names)
        return all(
            (tensor.data_ptr() - first, tensor.dtype, tuple(tensor.shape), tensor.stride())
            == (box.offset, box.dtype, box.shape, box.stride)
            for tensor, box in boxes
        )


def _written_after_a_read(plan: LoadPlan) -> set[str]:
    """Tensors of the model that the loading code writes whole, after it has asked for what they held."""
    covers = coverage(plan)
    whole = ((name, plan.targets[name].box.numel) for name in plan.state_read if name in covers)
    return {name for name, count in whole if elements(covers, plan, name) == count}


@contextmanager
@signals.held
def _telling_what_was(last: LoadPlan, manifest: Manifest) -> Iterator[None]:
    """Inside, a problem says what the live version had: which tensors a source lacks, and in what shape one came."""
    try:
        yield
    except PlanError as error:
        filled_by: dict[str, dict[str, None]] = {}
        for step in last.steps:
            for name in step.destinations:
                filled_by.setdefault(name, {}).update(dict.fromkeys(step.sources))

        def known(problem: str) -> str:
            name, _, why = problem.partition(": ")
            name = name.partition(" (")[0]
            if why.startswith(("missing;", "partial;")) and name not in last.manifest:
                lacking = [source for source in filled_by.get(name, ()) if source not in manifest]
                return problem.partition(LACKS)[0] + (f"{LACKS}{some(lacking, 3)}" if lacking else "")
            before, now = last.manifest.get(name), manifest.get(name)
            if before is not None and now is not None and before != now and str(list(before.shape)) not in problem:
                was = f"{format_name(before.dtype)} {list(before.shape)}"
                return f"{problem}; in the live version's checkpoint it is {was}"
            return problem

        error.explain(known)
        raise


def _other_sizes(first: LoadPlan, plan: LoadPlan) -> Iterator[str]:
    """A warning for tensors that have more, or fewer, elements than in the first load.

    The model's own loading code took them all the same: it cuts out what it needs, and may have cut elsewhere.
    """
    used = {name for step in plan.steps for name in step.sources}
    for name in sorted(used & first.manifest.keys()) if plan is not first else ():
        before, now = first.manifest[name].shape, plan.manifest[name].shape
        if math.prod(before) != math.prod(now):
            yield (
                f"{name}: {list(now)} came, and in the first load {list(before)}; the model's own loading code took "
                f"both, and may read another part of it now: see live.explain({name!r})"
            )


def _same(first: Coverage, second: Coverage, name: str, plan: LoadPlan) -> bool:
    """Whether both cover the same elements."""
    ours, theirs = first.get(name, []), second.get(name, [])
    if ours == theirs:
        return True
    box = plan.targets[name].box
    return covered(ours, box) == covered(theirs, box) == covered([*ours, *theirs], box)


def _chosen(plan: LoadPlan, only: Patterns) -> Callable[[str], bool]:
    """Whether ``only`` matches a tensor under any of its names."""
    match = matches(only)
    owners = {target.owner for name, target in plan.targets.items() if match(name)}
    return lambda name: match(name) or (name in plan.targets and plan.targets[name].owner in owners)


def _restricted(plan: LoadPlan, only: Patterns, kept: Container[str]) -> LoadPlan:
    """The plan with only the steps that write what ``only`` matches; what is ``kept`` is not missing."""
    chosen = _chosen(plan, only)
    if plan.fallback:
        raise PlanError("only= needs a plan, and this model's own loading code must load a part of it; leave only= out")
    inside: list[Any] = []
    problems = []
    for level, step in zip(plan.levels or (0,) * len(plan.steps), plan.steps, strict=True):
        asked = {name: chosen(name) for name in step.destinations}
        if any(asked.values()):
            inside.append((level, step))
            problems += [
                f"{name}: is written together with what only= asks for"
                for name, is_asked in asked.items()
                if not is_asked
            ]
    if problems:
        raise PlanError("only= asks for a part of what is written as one", problems)
    used = {name for _, step in inside for name in step.sources}
    used |= {step.source for pair in plan.ties if chosen(pair[0].destination) for step in pair}
    moved = (Fate.WRITTEN, Fate.CAST, Fate.TIED)
    return replace(
        plan,
        steps=tuple(step for _, step in inside),
        levels=tuple(level for level, _ in inside) if plan.levels else (),
        ties=tuple(pair for pair in plan.ties if chosen(pair[0].destination)),
        fates={
            name: Fate.SKIPPED if fate in moved and name not in used else fate
            for name, fate in plan.fates.items()
            if fate is not Fate.MISSING or name not in kept
        },
    )
