"""LoadPlan: which source tensors become which destinations. Pure data: no modules, no bytes but small constants."""

from __future__ import annotations

import enum
import fnmatch
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from .manifest import TensorSpec, format_name
from .regions import Box, Region, whole

__all__ = ["Copy", "Fate", "LoadPlan", "Note", "Op", "Patterns", "Program", "Step", "Target", "both", "matches"]

Patterns = str | re.Pattern[str] | Iterable[str | re.Pattern[str]]
"""Names: strings are shell patterns over the whole name (``*.inv_freq``), compiled expressions are searched for."""


class Fate(enum.Enum):
    """What becomes of one tensor of the source, or of one name of the model."""

    WRITTEN = "written"
    TIED = "tied"  # its destination is another name's too, which is written; equal content is proven
    CAST = "cast"  # written, in another dtype
    SKIPPED = "skipped"  # the model's own loading code drops it
    MISSING = "missing"  # a name of the model that nothing writes, allowed
    PARTIAL = "partial"  # a name of the model of which some bytes are written, allowed
    UNEXPECTED = "unexpected"  # a tensor that no name takes, allowed


class Copy(msgspec.Struct, frozen=True, gc=False):
    """A box of one source tensor into a box of one destination, cast if the dtypes differ.

    Attributes:
        source: the source tensor's name.
        destination: the model tensor's name.
        of: which part of the source; ``None`` for all of it.
        into: which part of the destination; ``None`` for all of it.
    """

    source: str
    destination: str
    of: Box | None = None
    into: Box | None = None


class Op(msgspec.Struct, frozen=True):
    """One recorded operation.

    Attributes:
        func: the ATen overload.
        args: positional arguments, tensors replaced by regions.
        kwargs: keyword arguments, likewise.
        results: a region for each tensor that it returns and that is no operand.
        writes: regions of operands that it changes.
        reads: regions of all its operands.
    """

    func: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Region, ...]
    writes: tuple[Region, ...]
    reads: tuple[Region, ...]


class Program(msgspec.Struct, frozen=True):
    """Recorded operations that belong together.

    Attributes:
        sources: names of the source tensors they take.
        ops: the operations, in order.
        writes: regions of the model that they write.
    """

    sources: tuple[str, ...]
    ops: tuple[Op, ...]
    writes: tuple[Region, ...]


Step = Copy | Program


class Note(msgspec.Struct, frozen=True):
    """Something that loading code did and a plan cannot repeat.

    Attributes:
        what: in words.
        sources: names of the source tensors concerned.
        where: the line of the model's code, ``file:line``.
    """

    what: str
    sources: tuple[str, ...]
    where: str

    def __str__(self) -> str:
        return f"{self.what} of {', '.join(self.sources) or 'the model'} at {self.where}"


class Target(msgspec.Struct, frozen=True, gc=False):
    """One name of the model that can be written.

    Attributes:
        spec: its name, dtype and shape.
        owner: the first name of the same tensor; its own where it is not tied.
        problem: why it cannot be written, if it cannot.
        stride: in elements; ``None`` for a contiguous tensor.
    """

    spec: TensorSpec
    owner: str
    problem: str = ""
    stride: tuple[int, ...] | None = None

    @property
    def box(self) -> Box:
        """All of it, as it lies in memory."""
        assert isinstance(self.spec.dtype, torch.dtype)
        return whole(self.spec) if self.stride is None else Box(self.spec.dtype, self.spec.shape, self.stride, 0)


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
        notes: why: what it did that a plan cannot repeat.
        unproven: names of the model that only that code can write; that it did is seen when it runs.
        side_effects: attributes that the loading code changes and following the plan does not.
        state_read: tensors of the model whose values the loading code asked for; the plan holds for these values.
        warnings: what a person should read.
    """

    steps: tuple[Step, ...]
    ties: tuple[tuple[Copy, Copy], ...]
    fates: Mapping[str, Fate]
    casts: Mapping[str, str]
    levels: tuple[int, ...] = ()
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    fallback: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()
    unproven: tuple[str, ...] = ()
    side_effects: tuple[str, ...] = ()
    state_read: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

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

    def explain(self, name: str) -> str:
        """In words: which bytes of which source tensors become the model's tensor ``name``, and how."""
        lines = [line for step in self.steps for line in _explained(step, name)]
        lines += [
            f"  {second.source} is compared with {first.source}"
            for first, second in self.ties
            if name == first.destination
        ]
        if not lines:
            fate = self.fates.get(name)
            lines = [f"  nothing writes it{f' ({fate.value})' if fate else ''}"]
        return "\n".join([name, *lines])

    def __str__(self) -> str:
        copies = sum(isinstance(step, Copy) for step in self.steps)
        sliced = sum(isinstance(step, Copy) and (step.of is not None or step.into is not None) for step in self.steps)
        rows = [
            ("copies", f"{copies} ({sliced} of slices)"),
            (
                "programs",
                f"{len(self.steps) - copies} "
                f"({sum(len(step.ops) for step in self.steps if isinstance(step, Program))} operations)",
            ),
        ]
        rows += [(fate.value, f"{len(names)} tensors") for fate in Fate if (names := self.names(fate))]
        rows += [("fallback", f"{len(self.fallback)} tensors: {note}") for note in self.notes]
        rows += [("changes", effect) for effect in self.side_effects]
        rows += [("warning", warning) for warning in self.warnings]
        return "\n".join(f"{label:>10}  {text}" for label, text in rows)


def _explained(step: Step, name: str) -> Iterator[str]:
    if isinstance(step, Copy):
        if step.destination == name:
            yield f"  {_part(step.into)} <- {step.source} {_part(step.of)}"
    elif any(region.memory.name == name for region in step.writes):
        ops = " ".join(str(op.func).removeprefix("aten.").partition(".")[0] for op in step.ops)
        parts = ", ".join(_part(region.box) for region in step.writes if region.memory.name == name)
        yield f"  {parts} <- {ops}({', '.join(step.sources)})"


def _part(box: Box | None) -> str:
    if box is None:
        return "[all]"
    return f"[{format_name(box.dtype)} {list(box.shape)} stride {list(box.stride)} at byte {box.offset}]"


def matches(patterns: Patterns) -> Callable[[str], bool]:
    """A predicate that says whether a name matches any of ``patterns``."""
    searched = [re.compile(fnmatch.translate(one)) if isinstance(one, str) else one for one in _several(patterns)]
    return lambda name: any(one.search(name) for one in searched)


def both(one: Patterns, other: Patterns) -> list[str | re.Pattern[str]]:
    """The patterns of either."""
    return [*_several(one), *_several(other)]


def _several(patterns: Patterns) -> list[str | re.Pattern[str]]:
    return [patterns] if isinstance(patterns, (str, re.Pattern)) else list(patterns)
