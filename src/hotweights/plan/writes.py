"""Writes: what the steps of a plan write to the model, what they leave out, and every problem with that."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from ..boxes import Box, Region, covered, extent, meets, whole
from ..dtypes import Cast, DType, OpaqueDtype, format_name, is_float, may_cast, narrowest_cast
from ..manifest import Manifest, TensorSpec
from .sharing import Sharing
from .steps import Copy, Fate, Op, Program, Step, Target

_COPY = torch.ops.aten.copy_.default


class Gap(NamedTuple):
    """A tensor of the model of which not every element is written.

    Attributes:
        spec: what it is.
        names: all its names, in the order of the model.
        written: how many of its elements are written.
    """

    spec: TensorSpec
    names: tuple[str, ...]
    written: int


class Writes:
    """Steps, added in the order in which they are done.

    Attributes:
        steps: those that write something new, under the names of the tensors that hold the bytes.
        levels: of each step.
        ties: pairs of copies to one place; the second is not among the steps.
        fates: of the source tensors that steps take.
        casts: by source name, "from -> to" dtypes.
        problems: what is wrong with single steps.
        misfits: names of the model that would get a tensor of another shape; each of them is a problem.
    """

    def __init__(
        self, manifest: Manifest, targets: Mapping[str, Target], cast: Cast, *, last_wins: bool = False
    ) -> None:
        """With ``last_wins``, code that writes a tensor of one name again means it; of several names, they are ties."""
        self.steps: list[Step] = []
        self.levels: list[int] = []
        self.ties: list[tuple[Copy, Copy]] = []
        self.fates: dict[str, Fate] = {}
        self.casts: dict[str, str] = {}
        self.problems: list[str] = []
        self.misfits: list[str] = []
        self._manifest = manifest
        self._targets = targets
        self._cast = cast
        self._alone = {owner for owner, count in _names(targets).items() if count == 1} if last_wins else frozenset()
        self._sharing = Sharing(targets)
        # All of these by the target's owner. Whole copies are by far the most, so they have a table of their own.
        self._whole: dict[str, Copy] = {}
        self._parts: dict[str, list[tuple[Box, Step]]] = defaultdict(list)
        self._exact: dict[tuple[str, Box], Copy] = {}  # the last copy to exactly this box
        # Boxes in order, ``None`` for all of it; was it a copy?
        self._history: dict[str, list[tuple[Box | None, bool]]] = defaultdict(list)

    def add(self, level: int, step: Step) -> None:
        """Add a step of this level. One that only repeats or ties an earlier one is not kept among the steps."""
        if isinstance(step, Program):
            step = self._sharing.at_home(step)
            self._add_program(step)
        else:
            name, box = step.destination, step.into
            homes = [] if box is None else self._sharing.homes(name, box)
            if len(homes) > 1:
                self._add_spread(step, homes)
            else:
                if homes:
                    step = self._plain(Copy(step.source, homes[0][0], step.of, homes[0][1]))
                if not self._add_copy(step):
                    return
        self.steps.append(step)
        self.levels.append(level)

    def _add_spread(self, step: Copy, homes: Sequence[tuple[str, Box]]) -> None:
        """A copy into memory that several names share side by side."""
        self.fates.setdefault(step.source, Fate.WRITTEN)
        for name, box in homes:
            self._parts[self._targets[name].owner].append((box, step))
            self._history[self._targets[name].owner].append((box, True))

    def _plain(self, step: Copy) -> Copy:
        """The copy without boxes where they are all of both tensors: a check by name says more than one by bytes."""
        target = self._targets.get(step.destination)
        spec = self._manifest[step.source]
        if target is None or step.into != target.box or isinstance(spec.dtype, OpaqueDtype) or step.of != whole(spec):
            return step
        return Copy(step.source, step.destination)

    def _add_copy(self, step: Copy) -> bool:
        """Whether the copy writes something new."""
        self.fates.setdefault(step.source, Fate.WRITTEN)
        target = self._targets.get(step.destination)
        if target is None:  # A tensor that no name leads to, in a list or an attribute.
            return True
        owner, into = target.owner, step.into
        before = self._whole.get(owner) if into is None else self._exact.get((owner, into))
        again = before is not None and owner in self._alone and before.source != step.source
        if before is not None and not again and self._stands(owner, target.box if into is None else into):
            self._add_tie(before, step)
            return False
        self._history[owner].append((into, True))
        if into is None:
            self._whole[owner] = step
            self._check_whole(step, self._manifest[step.source], target)
        else:
            self._exact[owner, into] = step
            self._parts[owner].append((into, step))
            self._check_part(step, into, target)
        return True

    def _stands(self, owner: str, box: Box) -> bool:
        """Whether these bytes are as a copy wrote them. Only then a second copy to them is a tie."""
        for written, copied in reversed(self._history[owner]):
            other = self._targets[owner].box if written is None else written
            if other == box:
                return copied
            if meets(other, box):
                return False
        return True

    def _add_tie(self, before: Copy, step: Copy) -> None:
        if before.source == step.source and before.of == step.of:
            return  # The same bytes once more.
        first, second = self._manifest[before.source], self._manifest[step.source]
        self.fates[step.source] = Fate.TIED
        self.ties.append((before, step))
        if (first.dtype, _shape(before, first)) != (second.dtype, _shape(step, second)):
            self.problems.append(
                f"{step.destination}: one tensor with {before.destination}, but the source has {second} and {first}"
            )

    def _add_program(self, step: Program) -> None:
        for source in step.sources:
            self.fates.setdefault(source, Fate.WRITTEN)
            spec = self._manifest[source]
            if isinstance(spec.dtype, OpaqueDtype):
                self.problems.append(f"{spec}: torch has no such type, and it would have to be converted")
        for op in step.ops:
            for region in op.writes:
                if region.memory.kind != "model":
                    continue
                for name, box in self._sharing.homes(region.memory.name, region.box):
                    target = self._targets.get(name)
                    if target is not None:
                        self._parts[target.owner].append((box, step))
                        self._history[target.owner].append((box, False))
                        self._check_op(step, op, region, target)

    # Problems of single steps.

    def _check_op(self, step: Program, op: Op, region: Region, target: Target) -> None:
        name = target.spec.name
        if target.problem:
            self.problems.append(f"{name}: {target.problem}")
        source = op.args[1] if op.func is _COPY else None
        if not isinstance(source, Region):
            return
        if source.box.dtype != region.box.dtype and self._cast != "loader":
            for source_name in step.sources:
                self._check_cast(source_name, source.box.dtype, name, region.box.dtype)
        if source.box.numel != region.box.numel:
            self.problems.append(
                f"{name}: {list(source.box.shape)} would be broadcast, silently, into {list(region.box.shape)}"
                + (_from(step.sources[0], name) if len(step.sources) == 1 else "")
            )

    def _check_whole(self, step: Copy, found: TensorSpec, target: Target) -> None:
        expected = target.spec
        if target.problem:
            self.problems.append(f"{expected.name}: {target.problem}")
        if not fits(found.shape, expected.shape):
            self.misfits.append(expected.name)
            self.problems.append(
                f"{expected.name}: shape {list(expected.shape)} expected, {list(found.shape)} found"
                + _from(step.source, expected.name)
            )
        if found.dtype != expected.dtype:
            self._check_cast(step.source, found.dtype, expected.name, expected.dtype)

    def _check_part(self, step: Copy, into: Box, target: Target) -> None:
        if target.problem:
            self.problems.append(f"{target.spec.name}: {target.problem}")
        found = step.of.dtype if step.of is not None else self._manifest[step.source].dtype
        if found != into.dtype:
            self._check_cast(step.source, found, target.spec.name, into.dtype)

    def _check_cast(self, source: str, found: DType, name: str, expected: DType) -> None:
        change = f"{format_name(found)} -> {format_name(expected)}"
        if isinstance(found, OpaqueDtype) or isinstance(expected, OpaqueDtype):
            self.problems.append(f"{name}: {change}: torch {torch.__version__} has no such type")
        elif is_float(found) and not is_float(expected):
            self.problems.append(f"{name}: {change} cuts off fractions{_from(source, name)}")
        elif not may_cast(found, expected, self._cast):
            needed = narrowest_cast(found, expected)
            self.problems.append(f'{name}: {change} loses information{_from(source, name)}; cast="{needed}" allows it')
        else:
            self.fates[source] = Fate.CAST
            self.casts[source] = change

    # What all steps together write; asked for when every step is added.

    def gaps(self) -> Iterator[Gap]:
        """The tensors of the model that are not written whole."""
        names_of: dict[str, list[str]] = defaultdict(list)
        for name, target in self._targets.items():
            if target.owner not in self._whole:
                names_of[target.owner].append(name)
        written = self._boxes_by_owner()
        for owner, names in names_of.items():
            boxes = written(owner)
            count = covered(boxes, self._targets[owner].box) if boxes else 0
            if not boxes or count < self._targets[owner].box.numel:
                yield Gap(self._targets[names[0]].spec, tuple(names), count)

    def sources_of(self, names: Iterable[str]) -> list[str]:
        """The source tensors that are written to one tensor of the model, which has these names; sorted."""
        owners = {self._targets[name].owner for name in names}
        steps = [step for owner in owners for _, step in self._parts.get(owner, ())]
        return sorted({source for step in steps for source in step.sources})

    def _boxes_by_owner(self) -> Callable[[str], list[Box]]:
        """A function that gives what is written to the bytes of an owner, under whatever name."""
        parts = [(owner, box) for owner, several in self._parts.items() for box, _ in several]
        whole = [(owner, target.box) for owner in self._whole if (target := self._targets[owner]).memory]
        shared = self._sharing.pooled([*parts, *whole])
        return lambda owner: shared(owner) or [box for box, _ in self._parts.get(owner, ())]

    def overlaps(self, overlapping: Iterable[tuple[str, str]]) -> Iterator[str]:
        """A problem for each of these pairs of targets that share bytes, of which both are written."""
        written = self._whole.keys() | self._parts.keys()
        for first, second in overlapping:
            if self._targets[first].owner in written and self._targets[second].owner in written:
                yield f"{second}: shares memory with {first}, and both are written; only one of them can be"

    def double_writes(self) -> Iterator[str]:
        """A problem for bytes that copies of different source tensors write, one after the other."""
        for owner, parts in self._parts.items():
            spans = sorted(((*extent(box), number) for number, (box, _) in enumerate(parts)), key=lambda span: span[:2])
            reach, last = 0, -1  # The part that reaches farthest so far, and up to where.
            for start, stop, number in spans:
                meant = owner in self._alone and parts[last][0] == parts[number][0]
                if start < reach and not meant and _both_write(parts[last], parts[number]):
                    first, second = (
                        f"{name} {list(self._manifest[name].shape)}"
                        for name in (parts[last][1].sources[0], parts[number][1].sources[0])
                    )
                    yield f"{owner}: bytes written twice, from {first} and from {second}"
                reach, last = max((reach, last), (stop, number))
            if owner in self._whole and any(isinstance(step, Copy) for _, step in parts):
                yield f"{owner}: written twice, from {self._whole[owner].source} as a whole and in parts"


def _names(targets: Mapping[str, Target]) -> Counter[str]:
    return Counter(target.owner for target in targets.values())


def fits(found: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether a tensor of one shape may be copied into one of another as a whole."""
    # One element into none is how torch before 0.4 saved scalars; load_state_dict takes it too.
    return tuple(found) == tuple(expected) or (tuple(found) == (1,) and tuple(expected) == ())


def _both_write(first: tuple[Box, Step], second: tuple[Box, Step]) -> bool:
    (box, step), (other_box, other) = first, second
    if not (isinstance(step, Copy) and isinstance(other, Copy)):
        return False
    return step.source != other.source and meets(box, other_box)


def _shape(step: Copy, spec: TensorSpec) -> tuple[int, ...]:
    return spec.shape if step.of is None else step.of.shape


def _from(source: str, destination: str) -> str:
    return "" if source == destination else f" (from {source})"
