"""LoadPlan: which source tensors become which destinations. Pure data and arithmetic: no modules, no bytes.

The plan here is *by name*: what ``load_state_dict`` would do, and what it would do in silence as a problem.
"""

from __future__ import annotations

import enum
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import msgspec
import torch

from .errors import PlanError, UnknownName
from .manifest import DType, Manifest, OpaqueDtype, TensorSpec, format_name

__all__ = [
    "Cast",
    "Copy",
    "Fate",
    "LoadPlan",
    "Patterns",
    "Program",
    "Step",
    "Target",
    "both",
    "is_lossless",
    "matches",
    "pieces",
    "plan_by_name",
]

Cast = Literal["error", "loader"]
"""What a cast that loses information is: a problem, or what the loader means to do."""

Patterns = str | re.Pattern[str] | Iterable[str | re.Pattern[str]]
"""Names: strings are shell patterns over the whole name (``*.inv_freq``), compiled expressions are searched for."""


class Fate(enum.Enum):
    """What becomes of one tensor of the source, or of one name of the model."""

    WRITTEN = "written"
    TIED = "tied"  # its destination is another name's too, which is written; equal content is proven
    CAST = "cast"  # written, in another dtype
    SKIPPED = "skipped"  # the model's own loading code drops it
    MISSING = "missing"  # a name of the model that nothing writes, allowed
    UNEXPECTED = "unexpected"  # a tensor that no name takes, allowed


class Copy(msgspec.Struct, frozen=True, gc=False):
    """All of one source tensor into all of one destination, cast if the dtypes differ."""

    source: str
    destination: str


@dataclass(frozen=True, slots=True)
class Program:
    """Operations that make one or more destinations of one or more source tensors.

    Attributes:
        sources: names of the tensors it takes, all at once.
        produces: what it makes: by destination, name, dtype and shape.
        run: the operations. It gets owned tensors by source name, which it may change, and returns tensors
            by destination, which the executor copies into place.
    """

    sources: tuple[str, ...]
    produces: Mapping[str, TensorSpec]
    run: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]] = field(compare=False)


Step = Copy | Program


class Target(msgspec.Struct, frozen=True, gc=False):
    """One name of the model that can be written.

    Attributes:
        spec: its name, dtype and shape.
        owner: the first name of the same tensor; its own where it is not tied.
        problem: why it cannot be written, if it cannot.
    """

    spec: TensorSpec
    owner: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What will be copied, and what becomes of every name. Made before the first byte is read.

    Attributes:
        steps: what to do; each destination is written by one step.
        ties: pairs of source names that become the same tensor; the second is compared, not written.
        fates: by tensor of the source; and, for ``MISSING``, by name of the model.
        casts: by source name, "from -> to" dtypes.
        warnings: what a person should read.
    """

    steps: tuple[Step, ...]
    ties: tuple[tuple[str, str], ...]
    fates: Mapping[str, Fate]
    casts: Mapping[str, str]
    warnings: tuple[str, ...] = ()

    def names(self, fate: Fate) -> tuple[str, ...]:
        """The names with this fate, sorted."""
        return tuple(sorted(name for name, found in self.fates.items() if found is fate))


def matches(patterns: Patterns) -> Callable[[str], bool]:
    """A predicate that says whether a name matches any of ``patterns``."""
    searched = [re.compile(fnmatch.translate(one)) if isinstance(one, str) else one for one in _several(patterns)]
    return lambda name: any(one.search(name) for one in searched)


def both(one: Patterns, other: Patterns) -> list[str | re.Pattern[str]]:
    """The patterns of either."""
    return [*_several(one), *_several(other)]


def _several(patterns: Patterns) -> list[str | re.Pattern[str]]:
    return [patterns] if isinstance(patterns, (str, re.Pattern)) else list(patterns)


def plan_by_name(
    manifest: Manifest,
    targets: Mapping[str, Target],
    *,
    steps: Iterable[Step] | None = None,
    skip: Patterns = (),
    allow_missing: Patterns = (),
    allow_unexpected: Patterns = (),
    cast: Cast = "error",
    overlapping: Iterable[tuple[str, str]] = (),
    problems: Iterable[str] = (),
) -> LoadPlan:
    """Plan the loading of ``manifest`` into ``targets``.

    Args:
        manifest: what the source promises.
        targets: the names of the model.
        steps: what goes where; by default each tensor to the target of its name.
        skip: tensors that the model's own loading code drops.
        allow_missing: names of the model that may stay as they are.
        allow_unexpected: tensors that may have no place.
        cast: what a cast that loses information is.
        overlapping: pairs of targets that share bytes without being the same tensor.
        problems: what the caller found already.

    Raises:
        PlanError: with every problem.
    """
    if cast not in get_args(Cast):
        raise UnknownName("cast", cast, get_args(Cast))
    if steps is None:
        steps = [Copy(name, name) for name in manifest if name in targets]
    draft = _Draft(manifest, targets, cast, list(problems))
    for step in steps:
        draft.add(step)
    draft.find_unexpected(matches(skip), matches(allow_unexpected))
    draft.find_missing(matches(allow_missing))
    draft.find_overlaps(overlapping)
    return draft.finish()


class _Draft:
    """A plan in the making: collects steps, fates and problems."""

    def __init__(self, manifest: Manifest, targets: Mapping[str, Target], cast: Cast, problems: list[str]) -> None:
        self.manifest = manifest
        self.targets = targets
        self.cast = cast
        self.problems = problems
        self.steps: list[Step] = []
        self.ties: list[tuple[str, str]] = []
        self.fates: dict[str, Fate] = {}
        self.casts: dict[str, str] = {}
        self.written: dict[str, Step] = {}  # by owner

    def add(self, step: Step) -> None:
        if isinstance(step, Copy):
            self._add_copy(step)
        else:
            self._add_program(step)

    def _add_copy(self, step: Copy) -> None:
        target = self.targets[step.destination]
        before = self.written.get(target.owner)
        if isinstance(before, Copy) and before.source != step.source:
            self._add_tie(before, step)
            return
        self.fates[step.source] = Fate.WRITTEN
        if self._claim(target, step):
            self._check(step.source, self.manifest[step.source], target)
            self.steps.append(step)

    def _add_tie(self, before: Copy, step: Copy) -> None:
        first, second = self.manifest[before.source], self.manifest[step.source]
        self.fates[step.source] = Fate.TIED
        self.ties.append((before.source, step.source))
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            self.problems.append(
                f"{step.destination}: one tensor with {before.destination}, but the source has {second} and {first}"
            )

    def _add_program(self, step: Program) -> None:
        for source in step.sources:
            self.fates[source] = Fate.WRITTEN
        for destination, spec in step.produces.items():
            if destination not in self.targets:
                self.problems.append(f"{destination}: made of {_some(step.sources)}, but the model has no such name")
            elif self._claim(self.targets[destination], step):
                self._check(step.sources[0], spec, self.targets[destination])
        if step.sources[0] in self.casts:  # What they become together is cast, so each of them is.
            for source in step.sources:
                self.fates[source] = Fate.CAST
                self.casts[source] = self.casts[step.sources[0]]
        self.steps.append(step)

    def _claim(self, target: Target, step: Step) -> bool:
        before = self.written.setdefault(target.owner, step)
        if before is not step:
            sources = [before.source] if isinstance(before, Copy) else list(before.sources)
            self.problems.append(f"{target.spec.name}: written twice, from {_some(sources)} and again")
        return before is step

    def _check(self, source: str, found: TensorSpec, target: Target) -> None:
        expected = target.spec
        if target.problem:
            self.problems.append(f"{expected.name}: {target.problem}")
        # One element into none is how torch before 0.4 saved scalars; load_state_dict takes it too.
        if found.shape != expected.shape and not (found.shape == (1,) and expected.shape == ()):
            self.problems.append(
                f"{expected.name}: shape {list(expected.shape)} expected, {list(found.shape)} found"
                + _from(source, expected.name)
            )
        if found.dtype != expected.dtype:
            self._check_cast(source, found.dtype, expected)

    def _check_cast(self, source: str, found: DType, expected: TensorSpec) -> None:
        change = f"{format_name(found)} -> {format_name(expected.dtype)}"
        if isinstance(found, OpaqueDtype) or isinstance(expected.dtype, OpaqueDtype):
            self.problems.append(f"{expected.name}: {change}: torch {torch.__version__} has no such type")
        elif _is_float(found) and not _is_float(expected.dtype):
            self.problems.append(f"{expected.name}: {change} cuts off fractions{_from(source, expected.name)}")
        elif self.cast == "error" and not is_lossless(found, expected.dtype):
            self.problems.append(
                f'{expected.name}: {change} loses information{_from(source, expected.name)}; cast="loader" allows it'
            )
        else:
            self.fates[source] = Fate.CAST
            self.casts[source] = change

    def find_unexpected(self, skipped: Callable[[str], bool], allowed: Callable[[str], bool]) -> None:
        for name in self.manifest:
            if name in self.fates:
                continue
            self.fates[name] = Fate.SKIPPED if skipped(name) else Fate.UNEXPECTED
            if self.fates[name] is Fate.UNEXPECTED and not allowed(name):
                self.problems.append(f"{name}: unexpected; the model has no such name")

    def find_missing(self, allowed: Callable[[str], bool]) -> None:
        tied: dict[str, list[str]] = {}
        for name, target in self.targets.items():
            if target.owner not in self.written:
                tied.setdefault(target.owner, []).append(name)
        for names in tied.values():
            spec = self.targets[names[0]].spec
            if any(map(allowed, names)):
                self.fates.update(dict.fromkeys(names, Fate.MISSING))
            else:
                also = f" (tied with {_some(names[1:])})" if len(names) > 1 else ""
                self.problems.append(
                    f"{names[0]}: missing; {format_name(spec.dtype)} {list(spec.shape)} expected{also}"
                )

    def find_overlaps(self, overlapping: Iterable[tuple[str, str]]) -> None:
        for first, second in overlapping:
            if self.targets[first].owner in self.written and self.targets[second].owner in self.written:
                self.problems.append(f"{second}: shares memory with {first}; by name nobody can say which of them wins")

    def finish(self) -> LoadPlan:
        if self.problems:
            raise PlanError("source and model do not fit; nothing was read or written", set(self.problems))
        return LoadPlan(tuple(self.steps), tuple(self.ties), self.fates, self.casts)


def _from(source: str, destination: str) -> str:
    return "" if source == destination else f" (from {source})"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


# Of each float: bits of its significand, its smallest and largest exponent, and whether it has infinities, NaN, signs
# and zero. finfo does not say all of it. Sources: IEEE 754, the OCP 8-bit and microscaling formats, arXiv:2206.02915.
_FLOATS: Mapping[str, tuple[int, int, int, frozenset[str]]] = {
    "float64": (53, -1074, 1023, frozenset({"inf", "nan", "sign", "zero", "-0"})),
    "float32": (24, -149, 127, frozenset({"inf", "nan", "sign", "zero", "-0"})),
    "float16": (11, -24, 15, frozenset({"inf", "nan", "sign", "zero", "-0"})),
    "bfloat16": (8, -133, 127, frozenset({"inf", "nan", "sign", "zero", "-0"})),
    "float8_e4m3fn": (4, -9, 8, frozenset({"nan", "sign", "zero", "-0"})),
    "float8_e5m2": (3, -16, 15, frozenset({"inf", "nan", "sign", "zero", "-0"})),
    "float8_e4m3fnuz": (4, -10, 7, frozenset({"nan", "sign", "zero"})),
    "float8_e5m2fnuz": (3, -17, 15, frozenset({"nan", "sign", "zero"})),
    "float8_e8m0fnu": (1, -127, 127, frozenset({"nan"})),
}


def is_lossless(found: torch.dtype, expected: torch.dtype) -> bool:
    """Whether every value of ``found`` is a value of ``expected``, so that a cast loses nothing."""
    if found == expected:
        return True
    if found.is_complex or expected.is_complex:
        return expected.is_complex and is_lossless(_real(found), expected.to_real())
    if found == torch.bool:
        return not expected.is_floating_point or "zero" in _float(expected)[3]
    if expected == torch.bool:
        return False
    if not found.is_floating_point and not expected.is_floating_point:
        here, there = torch.iinfo(found), torch.iinfo(expected)
        return there.min <= here.min and here.max <= there.max
    if not expected.is_floating_point:
        return False
    bits, low, high, has = _float(expected)
    if not found.is_floating_point:
        info = torch.iinfo(found)
        # The most negative integer is a power of two: it needs range, not significant bits.
        return info.max.bit_length() <= bits and max(-info.min, info.max).bit_length() - 1 <= high and "zero" in has
    found_bits, found_low, found_high, found_has = _float(found)
    return found_bits <= bits and low <= found_low and found_high <= high and found_has <= has


def _float(dtype: torch.dtype) -> tuple[int, int, int, frozenset[str]]:
    # A float we do not know (packed ones) fits nowhere and holds nothing.
    return _FLOATS.get(str(dtype).removeprefix("torch."), (0, 10**6, -(10**6), frozenset()))


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def pieces(shape: tuple[int, ...], limit: int) -> Iterator[tuple[tuple[int | slice, ...], int, tuple[int, ...]]]:
    """Cut a row-major tensor into contiguous boxes of at most ``limit`` elements.

    Yields for each its index into the tensor, its first element, and its shape.
    """
    yield from _pieces(shape, max(1, limit), (), 0)


def _pieces(
    shape: tuple[int, ...], limit: int, prefix: tuple[int | slice, ...], first: int
) -> Iterator[tuple[tuple[int | slice, ...], int, tuple[int, ...]]]:
    row = 1
    for length in shape[1:]:
        row *= length
    if not shape or shape[0] * row <= limit:
        yield prefix, first, shape
    elif row <= limit:
        rows = limit // row
        for start in range(0, shape[0], rows):
            stop = min(start + rows, shape[0])
            yield (*prefix, slice(start, stop)), first + start * row, (stop - start, *shape[1:])
    else:
        for index in range(shape[0]):
            yield from _pieces(shape[1:], limit, (*prefix, index), first + index * row)
