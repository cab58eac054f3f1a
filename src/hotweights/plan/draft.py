"""Drafting: from steps to a plan. It finds the fate of every name, what is covered, and every problem, all at once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import get_args

import torch

from ..boxes import Box, Memory, Region, covered, extent, meets, whole
from ..dtypes import Cast, DType, OpaqueDtype, format_name, is_float, is_lossless
from ..errors import PlanError, UnknownName
from ..manifest import Manifest, TensorSpec
from .patterns import Patterns, matches
from .plan import LoadPlan
from .sharing import Sharing
from .steps import Copy, Fate, GraphBreak, Op, Program, Step, Target

_COPY = torch.ops.aten.copy_.default


def draft(
    manifest: Manifest,
    targets: Mapping[str, Target],
    *,
    steps: Iterable[tuple[int, Step]] | None = None,
    zeroed: Iterable[str] = (),
    skip: Patterns = (),
    allow_missing: Patterns = (),
    allow_partial: Patterns = (),
    allow_unexpected: Patterns = (),
    cast: Cast = "error",
    overlapping: Iterable[tuple[str, str]] = (),
    constants: Mapping[str, torch.Tensor] | None = None,
    fallback: Sequence[str] = (),
    graph_breaks: Sequence[GraphBreak] = (),
    side_effects: Sequence[str] = (),
    state_read: Iterable[str] = (),
    taken: Container[str] = (),
    problems: Iterable[str] = (),
) -> LoadPlan:
    """Make the plan of loading ``manifest`` into ``targets`` by ``steps``.

    Args:
        manifest: what the source promises.
        targets: the names of the model.
        steps: what to do, with levels; by default each tensor goes to the target of its name.
        zeroed: names of the model that are filled with zeros besides.
        skip: tensors that the model's own loading code drops.
        allow_missing: names of the model that may stay as they are.
        allow_partial: names of the model of which some bytes may stay as they are.
        allow_unexpected: tensors that may have no place.
        cast: what a cast that loses information is.
        overlapping: pairs of targets that share bytes without being the same tensor.
        constants: tensors that programs use.
        fallback: tensors that the model's own code will get.
        graph_breaks: what it did that a plan cannot repeat.
        side_effects: attributes that it changes.
        state_read: the model's tensors whose values it asked for.
        taken: tensors that it took; those that it writes nowhere are skipped.
        problems: what the caller found already.

    Raises:
        PlanError: with every problem.
    """
    if cast not in get_args(Cast):
        raise UnknownName("cast", cast, get_args(Cast))
    made = _Draft(manifest, targets, cast, list(problems))
    if steps is None:
        steps = ((0, Copy(name, name)) for name in manifest if name in targets)
    for level, step in steps:
        made.add(level, step)
    for name in zeroed:
        made.add(0, _zeros(targets[name]))
    for name in fallback:
        made.fates.setdefault(name, Fate.WRITTEN)
    made.find_unexpected(matches(skip), matches(allow_unexpected), taken)
    unproven = made.find_missing(matches(allow_missing), matches(allow_partial), bool(fallback))
    made.find_overlaps(overlapping)
    made.find_double_writes()
    if made.problems:
        raise PlanError("source and model do not fit; nothing was read or written", set(made.problems))
    return LoadPlan(
        steps=tuple(made.steps),
        levels=tuple(made.levels) if any(made.levels) else (),
        ties=tuple(made.ties),
        fates=made.fates,
        casts=made.casts,
        constants=constants or {},
        fallback=tuple(fallback),
        graph_breaks=tuple(graph_breaks),
        unproven=tuple(unproven),
        side_effects=tuple(side_effects),
        state_read=tuple(sorted(state_read)),
        manifest=manifest,
        targets=targets,
    )


class _Draft:
    """A plan in the making: collects steps, fates, coverage and problems."""

    def __init__(self, manifest: Manifest, targets: Mapping[str, Target], cast: Cast, problems: list[str]) -> None:
        self.sharing = Sharing(targets)
        self.manifest = manifest
        self.targets = targets
        self.cast = cast
        self.problems = problems
        self.steps: list[Step] = []
        self.levels: list[int] = []
        self.ties: list[tuple[Copy, Copy]] = []
        self.fates: dict[str, Fate] = {}
        self.casts: dict[str, str] = {}
        self.changes: dict[str, list[tuple[Box, bool]]] = defaultdict(list)  # Where steps wrote, in order; by a copy?
        # By owner. Whole copies are by far the most, so they have a table of their own.
        self.whole: dict[str, Copy] = {}
        self.parts: dict[str, list[tuple[Box, Step]]] = defaultdict(list)
        self.exact: dict[tuple[str, Box], Copy] = {}

    def add(self, level: int, step: Step) -> None:
        if isinstance(step, Copy):
            name, box = step.destination, step.into
            homes = [(name, box)] if box is None else self.sharing.homes(name, box)
            if len(homes) > 1:
                self._add_spread(level, step, homes)
                return
            step = self._plain(Copy(step.source, homes[0][0], step.of, homes[0][1]))
        else:
            step = self.sharing.at_home(step)
        if self._add_copy(step) if isinstance(step, Copy) else self._add_program(step):
            self.steps.append(step)
            self.levels.append(level)

    def _add_spread(self, level: int, step: Copy, homes: Sequence[tuple[str, Box | None]]) -> None:
        """A copy into memory that several names share side by side."""
        self.fates.setdefault(step.source, Fate.WRITTEN)
        for name, box in homes:
            assert box is not None
            self.parts[self.targets[name].owner].append((box, step))
            self.changes[self.targets[name].owner].append((box, True))
        self.steps.append(step)
        self.levels.append(level)

    def _plain(self, step: Copy) -> Copy:
        """Boxes that are all of a tensor are not worth their words; by name they are checked more exactly too."""
        target = self.targets.get(step.destination)
        spec = self.manifest[step.source]
        if target is None or step.into != target.box or isinstance(spec.dtype, OpaqueDtype) or step.of != whole(spec):
            return step
        return Copy(step.source, step.destination)

    def _add_copy(self, step: Copy) -> bool:
        target = self.targets.get(step.destination)
        self.fates.setdefault(step.source, Fate.WRITTEN)
        if target is None:  # A tensor that no name leads to, in a list or an attribute.
            return True
        box = target.box if step.into is None else step.into
        if step.into is None:
            before = self.whole.setdefault(target.owner, step)
            if before is not step and self._stands(target.owner, box):
                return self._add_tie(before, step)
            self.whole[target.owner] = step
            self.changes[target.owner].append((box, True))
            self._check(step, self.manifest[step.source], target)
            return True
        before = self.exact.setdefault((target.owner, step.into), step)
        if before is not step and self._stands(target.owner, box):
            return self._add_tie(before, step)
        self.exact[target.owner, step.into] = step
        self.changes[target.owner].append((box, True))
        self.parts[target.owner].append((step.into, step))
        self._check_parts(step, target)
        return True

    def _stands(self, owner: str, box: Box) -> bool:
        """Whether nothing has changed these bytes since they were last written as one; else writing them is no tie."""
        for other, copied in reversed(self.changes[owner]):
            if other == box:
                return copied
            if meets(other, box):
                return False
        return True

    def _add_tie(self, before: Copy, step: Copy) -> bool:
        if before.source == step.source and before.of == step.of:
            return False  # The same bytes once more.
        first, second = self.manifest[before.source], self.manifest[step.source]
        self.fates[step.source] = Fate.TIED
        self.ties.append((before, step))
        if (first.dtype, _shape(before, first)) != (second.dtype, _shape(step, second)):
            self.problems.append(
                f"{step.destination}: one tensor with {before.destination}, but the source has {second} and {first}"
            )
        return False

    def _add_program(self, step: Program) -> bool:
        for source in step.sources:
            self.fates.setdefault(source, Fate.WRITTEN)
            if isinstance(self.manifest[source].dtype, OpaqueDtype):
                self.problems.append(
                    f"{self.manifest[source]}: torch has no such type, and it would have to be converted"
                )
        for op in step.ops:
            for region in op.writes:
                if region.memory.kind != "model":
                    continue
                for name, box in self.sharing.homes(region.memory.name, region.box):
                    target = self.targets.get(name)
                    if target is not None:
                        self.parts[target.owner].append((box, step))
                        self.changes[target.owner].append((box, False))
                        self._check_write(step, op, region, target)
        return True

    def _check_write(self, step: Program, op: Op, region: Region, target: Target) -> None:
        if target.problem:
            self.problems.append(f"{target.spec.name}: {target.problem}")
        source = op.args[1] if op.func is _COPY else None
        if isinstance(source, Region) and source.box.dtype != region.box.dtype and self.cast == "error":
            spec = TensorSpec(target.spec.name, region.box.dtype, region.box.shape)
            for name in step.sources:
                self._check_cast(name, source.box.dtype, spec)
        if isinstance(source, Region) and source.box.numel != region.box.numel:
            self.problems.append(
                f"{target.spec.name}: {list(source.box.shape)} would be broadcast, silently, "
                f"into {list(region.box.shape)}"
            )

    def _check(self, step: Copy, found: TensorSpec, target: Target) -> None:
        expected = target.spec
        if target.problem:
            self.problems.append(f"{expected.name}: {target.problem}")
        # One element into none is how torch before 0.4 saved scalars; load_state_dict takes it too.
        if found.shape != expected.shape and not (found.shape == (1,) and expected.shape == ()):
            self.problems.append(
                f"{expected.name}: shape {list(expected.shape)} expected, {list(found.shape)} found"
                + _from(step.source, expected.name)
            )
        if found.dtype != expected.dtype:
            self._check_cast(step.source, found.dtype, expected)

    def _check_parts(self, step: Copy, target: Target) -> None:
        assert step.into is not None
        if target.problem:
            self.problems.append(f"{target.spec.name}: {target.problem}")
        found = step.of.dtype if step.of is not None else self.manifest[step.source].dtype
        if found != step.into.dtype:
            self._check_cast(step.source, found, TensorSpec(target.spec.name, step.into.dtype, step.into.shape))

    def _check_cast(self, source: str, found: DType, expected: TensorSpec) -> None:
        change = f"{format_name(found)} -> {format_name(expected.dtype)}"
        if isinstance(found, OpaqueDtype) or isinstance(expected.dtype, OpaqueDtype):
            self.problems.append(f"{expected.name}: {change}: torch {torch.__version__} has no such type")
        elif is_float(found) and not is_float(expected.dtype):
            self.problems.append(f"{expected.name}: {change} cuts off fractions{_from(source, expected.name)}")
        elif self.cast == "error" and not is_lossless(found, expected.dtype):
            self.problems.append(
                f'{expected.name}: {change} loses information{_from(source, expected.name)}; cast="loader" allows it'
            )
        else:
            self.fates[source] = Fate.CAST
            self.casts[source] = change

    def find_unexpected(
        self, skipped: Callable[[str], bool], allowed: Callable[[str], bool], taken: Container[str]
    ) -> None:
        for name in self.manifest:
            if name in self.fates:
                continue
            self.fates[name] = Fate.SKIPPED if name in taken or skipped(name) else Fate.UNEXPECTED
            if self.fates[name] is Fate.UNEXPECTED and not allowed(name):
                self.problems.append(f"{name}: unexpected; the model has no such name")

    def find_missing(
        self, may_miss: Callable[[str], bool], may_be_partial: Callable[[str], bool], fallback: bool
    ) -> list[str]:
        """Find what is not written; returns the names that only the fallback can write."""
        unproven: list[str] = []
        tied: dict[str, list[str]] = defaultdict(list)
        for name, target in self.targets.items():
            if target.owner not in self.whole:
                tied[target.owner].append(name)
        written = self._pooled()
        for owner, names in tied.items():
            spec = self.targets[names[0]].spec
            parts = written(owner)
            count = covered(parts, self.targets[owner].box) if parts else 0
            numel = math.prod(spec.shape)
            if parts and count == numel:
                continue
            if fallback and (count or not any(map(may_miss, names))):
                unproven.append(names[0])
            elif count == 0:
                words = f"missing; {format_name(spec.dtype)} {list(spec.shape)} expected"
                self._miss(names, Fate.MISSING, may_miss, words)
            else:
                words = f"partial; {count} of {numel} elements would be written"
                self._miss(names, Fate.PARTIAL, may_be_partial, words)
        return unproven

    def _pooled(self) -> Callable[[str], list[Box]]:
        """A function that gives what is written to the bytes of an owner, under whatever name."""
        parts = [(owner, box) for owner, several in self.parts.items() for box, _ in several]
        shared = self.sharing.pooled([*parts, *((owner, self.targets[owner].box) for owner in self.whole)])
        return lambda owner: shared(owner) or [box for box, _ in self.parts.get(owner, ())]

    def _miss(self, names: list[str], fate: Fate, allowed: Callable[[str], bool], words: str) -> None:
        if any(map(allowed, names)):
            self.fates.update(dict.fromkeys(names, fate))
        else:
            also = f" (tied with {_some(names[1:])})" if len(names) > 1 else ""
            self.problems.append(f"{names[0]}: {words}{also}")

    def find_overlaps(self, overlapping: Iterable[tuple[str, str]]) -> None:
        written = self.whole.keys() | self.parts.keys()
        for first, second in overlapping:
            if self.targets[first].owner in written and self.targets[second].owner in written:
                self.problems.append(f"{second}: shares memory with {first}; nobody can say which of them wins")

    def find_double_writes(self) -> None:
        """Bytes that two copies of different tensors write, one after the other."""
        for owner, parts in self.parts.items():
            spans = sorted(((*extent(box), number) for number, (box, _) in enumerate(parts)), key=lambda span: span[:2])
            reach = (0, -1)
            for start, stop, number in spans:
                if start < reach[0]:
                    self._compare_writes(owner, parts[reach[1]], parts[number])
                reach = max(reach, (stop, number))
            if owner in self.whole and any(isinstance(step, Copy) for _, step in parts):
                self.problems.append(f"{owner}: written twice, from {self.whole[owner].source} as a whole and in parts")

    def _compare_writes(self, owner: str, one: tuple[Box, Step], other: tuple[Box, Step]) -> None:
        (box, step), (beside, second) = one, other
        if isinstance(step, Copy) and isinstance(second, Copy) and step.source != second.source and meets(box, beside):
            self.problems.append(f"{owner}: bytes written twice, from {step.source} and from {second.source}")


def _zeros(target: Target) -> Program:
    region = Region(Memory("model", target.spec.name), target.box)
    op = Op(torch.ops.aten.zero_.default, (region,), {}, (), (region,), (region,))
    return Program((), (op,), (region,))


def _shape(step: Copy, spec: TensorSpec) -> tuple[int, ...]:
    return spec.shape if step.of is None else step.of.shape


def _from(source: str, destination: str) -> str:
    return "" if source == destination else f" (from {source})"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
