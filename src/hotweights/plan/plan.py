"""LoadPlan: which source tensors become which destinations. Pure data: no modules, no bytes but small constants."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import Any, Literal, get_args

import torch

from ..boxes import Box, meets, moved, slices, whole
from ..dtypes import OpaqueDtype, format_name
from ..errors import UnknownName
from ..manifest import Manifest
from .saved import file as planfile
from .steps import Copy, Fate, GraphBreak, Op, Program, Step, Target, layer_of

Order = Literal["layer", "file", "given"]
"""In which order independent steps are done: layer by layer, as their sources lie in the files, or as traced."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What will be done, and what becomes of every name. Made before the first byte is read; keeps no model alive.

    Attributes:
        steps: what to do, in an order that may be followed as it stands.
        levels: of each step; a step may only begin when all of lower levels are done, those of one are independent.
        ties: pairs of copies to one place; the second is compared, not written.
        fates: by tensor of the source; and, for ``MISSING`` and ``PARTIAL``, by name of the model.
        casts: by source name, "from -> to" dtypes.
        constants: tensors that programs use, by name.
        fallback: what the model's own code must do itself: names of the source tensors that it gets, owned.
        graph_breaks: why: what it did that a plan cannot repeat.
        unproven: names of the model that only that code can write; that it did is seen when it runs.
        side_effects: attributes that the loading code changes and following the plan does not.
        state_read: tensors of the model whose values the loading code asked for; the plan holds for these values.
        manifest: what it is a plan for.
        targets: the tensors of the model it is a plan for, those that only a step names included.
        digests: of the values of ``state_read``, by name.
        by_layer: whether each layer is done before the next begins, as far as levels allow.
    """

    steps: tuple[Step, ...]
    ties: tuple[tuple[Copy, Copy], ...]
    fates: Mapping[str, Fate]
    casts: Mapping[str, str]
    levels: tuple[int, ...] = ()
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    fallback: tuple[str, ...] = ()
    graph_breaks: tuple[GraphBreak, ...] = ()
    unproven: tuple[str, ...] = ()
    side_effects: tuple[str, ...] = ()
    state_read: tuple[str, ...] = ()
    manifest: Manifest = field(default_factory=lambda: Manifest(()))
    targets: Mapping[str, Target] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    by_layer: bool = False

    def names(self, fate: Fate) -> tuple[str, ...]:
        """The names with this fate, sorted."""
        return tuple(sorted(name for name, found in self.fates.items() if found is fate))

    def by_level(self) -> Iterator[tuple[Step, ...]]:
        """The steps of each level, lowest first."""
        if not self.levels:
            yield self.steps
            return
        several: dict[int, list[Step]] = defaultdict(list)
        for level, step in zip(self.levels, self.steps, strict=True):
            several[level].append(step)
        for level in sorted(several):
            yield tuple(several[level])

    def batches(self) -> Iterator[tuple[Step, ...]]:
        """What is done before the next is begun: the steps of each level; ordered by layer, those of each layer."""
        for steps in self.by_level():
            if self.by_layer:
                yield from (tuple(several) for _, several in groupby(steps, key=layer_of))
            else:
                yield steps

    # Order.

    def ordered(self, order: Order, position: Callable[[str], tuple[int, int]] | None = None) -> LoadPlan:
        """The same plan with its steps in another order; a step still comes after all of lower levels.

        Args:
            order: ``"layer"``: as the modules that own the destinations appear in the model, then by position;
                ``"file"``: by position; ``"given"``: as they are.
            position: where a source tensor lies, ``source.position``; by default its place in the manifest.
        """
        if order not in get_args(Order):
            raise UnknownName("order", order, get_args(Order))
        if order == "given":
            return replace(self, by_layer=False)
        if position is None:
            places = {name: (0, number) for number, name in enumerate(self.manifest)}
            position = places.__getitem__
        layers: dict[str, int] = {}
        for name in self.targets:
            layers.setdefault(name.rpartition(".")[0], len(layers))
        where = position

        def key(item: tuple[int, Step]) -> tuple[int, int, tuple[int, int]]:
            level, step = item
            layer = layers.get(layer_of(step), len(layers)) if order == "layer" else 0
            return level, layer, min(map(where, step.sources), default=(-1, -1))

        pairs = sorted(zip(self.levels or [0] * len(self.steps), self.steps, strict=True), key=key)
        return replace(
            self,
            steps=tuple(step for _, step in pairs),
            levels=tuple(level for level, _ in pairs) if self.levels else (),
            by_layer=order == "layer",
        )

    # Keeping it.

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file, all of it or nothing.

        Raises:
            PlanFileError: it holds an operation that no file may name; it can still be used as it is.
        """
        planfile.write(path, {one.name: getattr(self, one.name) for one in fields(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LoadPlan:
        """Read a plan that ``save`` wrote. It runs no code of the file; ``hw.load(plan=)`` checks that it fits.

        Raises:
            PlanFileError: the file is damaged, of another version, or no plan.
        """
        return cls(**planfile.read(path))

    def differences(self, manifest: Manifest, targets: Mapping[str, Target]) -> list[str]:
        """What is not as it was when the plan was made: a line for each tensor of the source or the model."""
        return [
            *_differing("source", self.manifest, manifest, str),
            *_differing("model", self.targets, targets, _as_target),
            *(
                f"model: {name}: {targets[name].problem}"
                for name in sorted(self._written() & targets.keys())
                if targets[name].problem
            ),
        ]

    def _written(self) -> set[str]:
        return {name for step in self.steps for name in step.destinations}

    # For people.

    def explain(self, name: str) -> str:
        """In words: which part of which source tensors becomes the model's tensor ``name``, and how."""
        levels = self.levels or (0,) * len(self.steps)
        found = [
            (level, first, line)
            for level, step in zip(levels, self.steps, strict=True)
            for first, line in self._explained(step, name)
        ]
        lines = [line for *_, line in sorted(found, key=lambda one: one[:2])]
        lines += [
            f"  {second.source} is compared with {first.source}: they are one tensor in the model"
            for first, second in self.ties
            if name == first.destination
        ]
        owner = self.targets[name].owner if name in self.targets else name
        if not lines and owner != name:
            return f"{self._titled(name)}\n  is one tensor with {owner}\n{self.explain(owner)}"
        if not lines and name in self.unproven:
            lines = [f"  the model's own code writes it: {note}" for note in self.graph_breaks]
        if not lines and name in self.targets:
            fate = self.fates.get(name)
            lines = [f"  nothing writes it{f' ({fate.value})' if fate else ''}; it keeps its values"]
        if not lines and name in self.manifest:
            return self._explain_source(name)
        if not lines:
            raise UnknownName("tensor", name, _alike(name, self.targets))
        return "\n".join([self._titled(name), *lines])

    def _titled(self, name: str) -> str:
        target = self.targets.get(name)
        if target is None:
            return name
        beside = [other for other in self.targets if other != name and self._reaches(other, None, name)]
        if not beside:
            return str(target.spec)
        words = ", ".join(beside) if len(beside) <= _SHOWN else f"{len(beside)} tensors"
        return f"{target.spec} (shares memory with {words})"

    def _explain_source(self, name: str) -> str:
        """A tensor of the source: where it goes."""
        into = dict.fromkeys(one for step in self.steps if name in step.sources for one in step.destinations)
        fate = self.fates.get(name)
        lines = [f"  goes into {one}" for one in into] or [f"  goes nowhere ({fate.value if fate else 'unused'})"]
        if name in self.fallback:
            lines = ["  is given to the model's own loading code"]
        return "\n".join([f"{self.manifest[name]} (of the source)", *lines])

    def _explained(self, step: Step, name: str) -> Iterator[tuple[int, str]]:
        """Where the step writes to bytes of ``name``, under this name or another: the first byte, and a line."""
        writes = [(one, box) for one, box in step.written if self._reaches(one, box, name)]
        if not writes:
            return
        first = min(0 if box is None else box.offset for _, box in writes)
        parts = " and ".join(dict.fromkeys(self._place(one, box, name) for one, box in writes))
        if isinstance(step, Copy):
            cast = f", cast {self.casts[step.source]}" if step.source in self.casts else ""
            yield first, f"  {parts} <- {step.source}{self._of(step.of, step.source)}{cast}"
        else:
            ops = ", ".join(map(_named, step.ops))
            yield first, f"  {parts} <- a program of {', '.join(step.sources) or 'no source'}: {ops}"

    def _reaches(self, written: str, box: Box | None, name: str) -> bool:
        """Whether a write to ``written`` changes bytes of ``name``: it is that, or shares memory with it."""
        if written == name:
            return True
        one, other = self.targets.get(written), self.targets.get(name)
        if one is None or other is None or not one.memory or one.memory != other.memory:
            return False
        return meets(moved(box or one.box, one.start), moved(other.box, other.start))

    def _place(self, written: str, box: Box | None, name: str) -> str:
        place = self._into(box, written)
        return place if written == name else written + place.removeprefix("all of it")

    def rows(self, step: Step) -> Iterator[tuple[str, str, str]]:
        """For a table: a destination, how it comes to be, and from what."""
        if isinstance(step, Copy):
            into = self._into(step.into, step.destination).removeprefix("all of it")
            how = f"cast {self.casts[step.source]}" if step.source in self.casts else "copy"
            yield step.destination + into, how, step.source + self._of(step.of, step.source)
            return
        for name in dict.fromkeys(step.destinations):
            yield name, "program: " + ", ".join(map(_named, step.ops)), ", ".join(step.sources)

    def _into(self, box: Box | None, name: str) -> str:
        target = self.targets.get(name)
        return "all of it" if box is None else _part(box, None if target is None else target.box) or "all of it"

    def _of(self, box: Box | None, name: str) -> str:
        spec = self.manifest.get(name)
        if box is None or spec is None or isinstance(spec.dtype, OpaqueDtype):
            return "" if box is None else _part(box, None)
        return _part(box, whole(spec))

    def __str__(self) -> str:
        copies = [step for step in self.steps if isinstance(step, Copy)]
        programs = [step for step in self.steps if isinstance(step, Program)]
        sliced = sum(step.of is not None or step.into is not None for step in copies)
        rows = [("copies", f"{len(copies)}" + (f", {sliced} of them of slices" if sliced else ""))]
        if programs:
            ops = Counter(_named(op) for step in programs for op in step.ops)
            common = ", ".join(f"{count} {name}" for name, count in ops.most_common(4))
            rows.append(("programs", f"{len(programs)} of {sum(ops.values())} operations: {common}"))
        if self.levels:
            rows.append(("levels", f"{max(self.levels) + 1}, done one after the other"))
        rows += [(fate.value, _some(names)) for fate in Fate if (names := self.names(fate))]
        if self.fallback:
            rows.append(("fallback", f"{_some(self.fallback)}, by the model's own code, because of"))
        rows += [("", f"  {note}") for note in self.graph_breaks]
        rows += (
            [("reads", f"{_some(self.state_read)} of the model: the plan holds for their values")]
            if self.state_read
            else []
        )
        rows += [("changes", effect) for effect in self.side_effects]
        return "\n".join(f"{label:>10}  {text}" for label, text in rows)


def _named(op: Op) -> str:
    return str(op.func).removeprefix("aten.").partition(".")[0]


def _part(box: Box, of: Box | None) -> str:
    """``[0:768, :]`` where that says it all; nothing for all of it; bytes where it is no rectangle."""
    if of is not None:
        ranges = slices(box, of)
        if ranges is not None:
            whole_ones = zip(ranges, of.shape, strict=True)
            words = [":" if one == (0, length) else f"{one[0]}:{one[1]}" for one, length in whole_ones]
            return f"[{', '.join(words)}]" if set(words) - {":"} else ""
    shape, stride = list(box.shape), list(box.stride)
    return f"[{format_name(box.dtype)} {shape} with strides {stride} from byte {box.offset}]"


_SHOWN = 3


def _some(names: tuple[str, ...]) -> str:
    if len(names) > _SHOWN:
        return f"{len(names)} tensors"
    return f"{len(names)}: {', '.join(names)}"


def _alike(name: str, known: Iterable[str]) -> list[str]:
    last = name.rpartition(".")[2]
    near = [one for one in known if name in one] or [one for one in known if one.endswith(last)] or list(known)
    return [*sorted(near)[:10], *(["..."] if len(near) > 10 else [])]


def _as_target(target: Target) -> str:
    stride = "" if target.stride is None else f" with strides {list(target.stride)}"
    beside = f" at byte {target.start} of the memory of {target.memory}" if target.memory else ""
    tied = "" if target.owner == target.spec.name else f" tied with {target.owner}"
    return f"{format_name(target.spec.dtype)} {list(target.spec.shape)}{stride}{tied}{beside}"


def _differing(
    whose: str, expected: Mapping[str, Any], found: Mapping[str, Any], words: Callable[[Any], str]
) -> Iterator[str]:
    for name, one in expected.items():
        other = found.get(name)
        if other is None:
            yield f"{whose}: {name}: is not there; the plan has {_short(words(one), name)}"
        elif other != one and words(other) != words(one):
            yield f"{whose}: {name}: {_short(words(other), name)} found, the plan has {_short(words(one), name)}"
    for name, other in found.items():
        if name not in expected:
            yield f"{whose}: {name}: {_short(words(other), name)} found, which the plan does not know"


def _short(words: str, name: str) -> str:
    return words.removeprefix(f"{name}: ")
