"""Lowering: the record of a trace becomes steps. Copies of slices wherever bytes are only moved, programs elsewhere.

Operations that only place bytes (``cat``, ``stack``, ``clone``, casts) are seen through: a stack of experts that is
copied into a parameter becomes one copy for each expert. Operations that share an intermediate result, or a source
that one of them changes, become one program. Steps that overlap in a destination, or read one, keep their order: each
step has a level, and runs when all lower levels are done.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..boxes import Box, Memory, Region, contiguous, extent, meets, narrowed, row_major
from ..plan.steps import Copy, Op, Program, Step

aten = torch.ops.aten


class _Part(NamedTuple):
    """One rectangular part of a result that is nothing but bytes of a source."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    source: Region
    cast: torch.dtype | None


def lower(records: Sequence[Op]) -> list[tuple[int, Step]]:
    """The steps of a record with their levels, in an order that keeps what must be kept."""
    knots: list[frozenset[int]] = []  # Operations that must be one program, because others would come between them.
    while True:
        groups = _Groups(records, knots)
        found = groups.knots()
        if not found:
            return groups.steps()
        knots += found


_StepKey = tuple[int, int]  # its first time; and which of the copies of that time, or -1 for a program


class _Groups:
    """Operations of a record gathered into steps-to-be."""

    def __init__(self, records: Sequence[Op], knots: Sequence[frozenset[int]]) -> None:
        self._records = records
        self._knots = knots
        self._kept = frozenset().union(*knots)
        self._mutated = {w.memory for op in records for w in op.writes if w.memory.kind != "model"}
        self._virtual: dict[Memory, tuple[Box, list[_Part]]] = {}
        self._copies: dict[int, list[Copy]] = {}
        nodes = [time for time in range(len(records)) if not self._lowered(time)]
        self._members = self._gather(self._live(nodes))  # by first time, all times in order
        self._edges = self._find_edges()

    # Seeing through operations that only place bytes.

    def _lowered(self, time: int) -> bool:
        op = self._records[time]
        if op.func is aten.copy_.default and op.writes[0].memory.kind == "model" and time not in self._kept:
            source = op.args[1]
            copies = self._as_copies(op.writes[0], source) if isinstance(source, Region) else None
            if copies is not None:
                self._copies[time] = copies
                return True
        elif op.func in _PLACING and len(op.results) == 1 and op.results[0].memory not in self._mutated:
            parts = _PLACING[op.func](self, op)
            if parts is not None:
                self._virtual[op.results[0].memory] = (op.results[0].box, parts)
        return False

    def _as_copies(self, destination: Region, source: Region) -> list[Copy] | None:
        parts = self.parts(source)
        if parts is None:
            return None
        into = destination.box
        if source.box.shape != into.shape:
            if source.box.numel != into.numel or len(parts) > 1 or not contiguous(parts[0].source.box):
                return None
            only = parts[0].source
            box = Box(only.box.dtype, into.shape, row_major(into.shape), only.box.offset)
            parts = [_Part((0,) * len(into.shape), into.shape, Region(only.memory, box), parts[0].cast)]
        if any(part.cast not in (None, into.dtype) for part in parts):
            return None
        return [
            Copy(
                part.source.memory.name,
                destination.memory.name,
                part.source.box,
                narrowed(into, part.start, part.shape),
            )
            for part in parts
        ]

    def parts(self, region: Region) -> list[_Part] | None:
        """The bytes of sources that ``region`` is made of, if it is made of nothing else."""
        if region.memory in self._mutated:
            return None
        shape = region.box.shape
        if region.memory.kind == "source":
            return [_Part((0,) * len(shape), shape, region, None)]
        if region.memory not in self._virtual:
            return None
        box, parts = self._virtual[region.memory]
        if box == region.box:
            return parts
        return _cut(box, parts, region.box)

    def cat(self, op: Op) -> list[_Part] | None:
        tensors, dim = op.args[0], op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
        return self._joined(tensors, dim, op.results[0].box, grows=False)

    def stack(self, op: Op) -> list[_Part] | None:
        tensors, dim = op.args[0], op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
        return self._joined(tensors, dim, op.results[0].box, grows=True)

    def _joined(self, tensors: Sequence[Any], dim: int, box: Box, *, grows: bool) -> list[_Part] | None:
        dim %= len(box.shape)
        joined: list[_Part] = []
        at = 0
        for tensor in tensors:
            parts = self.parts(tensor) if isinstance(tensor, Region) else None
            if (
                parts is None
                or tensor.box.dtype != box.dtype
                or (not grows and len(tensor.box.shape) != len(box.shape))
            ):
                return None  # Promotion, or the empty tensors of rank one that cat forgives.
            for part in parts:
                if grows:
                    part = _grown(part, dim)
                joined.append(part._replace(start=(*part.start[:dim], part.start[dim] + at, *part.start[dim + 1 :])))
            at += 1 if grows else tensor.box.shape[dim]
        return joined

    def same(self, op: Op) -> list[_Part] | None:
        source = op.args[0]
        parts = self.parts(source) if isinstance(source, Region) else None
        dtype = op.results[0].box.dtype
        if parts is None or dtype == source.box.dtype:
            return parts
        if any(part.cast is not None for part in parts):
            return None
        return [part._replace(cast=dtype) for part in parts]

    # What belongs together.

    def _live(self, nodes: list[int]) -> list[int]:
        wanted: set[Memory] = set()
        live: list[int] = []
        for time in reversed(nodes):
            op = self._records[time]
            made = (*op.results, *op.writes)
            if any(one.memory.kind == "model" for one in op.writes) or any(one.memory in wanted for one in made):
                live.append(time)
                wanted.update(one.memory for one in op.reads if one.memory.kind != "model")
        return live[::-1]

    def _gather(self, live: list[int]) -> dict[int, list[int]]:
        leader: dict[int, int] = {}

        def find(time: int) -> int:
            while leader[time] != time:
                leader[time] = leader[leader[time]]
                time = leader[time]
            return time

        last: dict[Memory, int] = {}
        for time in live:
            leader[time] = time
            op = self._records[time]
            for one in (*op.reads, *op.results):
                if one.memory.kind == "model" or (one.memory.kind == "constant" and one.memory not in self._mutated):
                    continue
                if one.memory in last:
                    leader[find(last[one.memory])] = find(time)
                last[one.memory] = time
        for knot in self._knots:
            tied = [time for time in live if time in knot]
            for earlier, later in itertools.pairwise(tied):
                leader[find(earlier)] = find(later)
        members: dict[int, list[int]] = defaultdict(list)
        for time in live:
            members[find(time)].append(time)
        return {times[0]: times for times in members.values()}

    # What must come before what.

    def _find_edges(self) -> set[tuple[_StepKey, _StepKey]]:
        """Pairs of steps, the first of which must be done before the second begins."""
        accesses: dict[str, list[_Access]] = defaultdict(list)
        for time, copies in self._copies.items():
            for number, copy in enumerate(copies):
                assert copy.into is not None
                accesses[copy.destination].append(_Access(*extent(copy.into), time, (time, number), True, copy.into))
        for first, times in self._members.items():
            for time in times:
                op = self._records[time]
                for one in op.reads:
                    if one.memory.kind == "model":
                        access = _Access(*extent(one.box), time, (first, -1), one in op.writes, one.box)
                        accesses[one.memory.name].append(access)
        return {edge for several in accesses.values() if len(several) > 1 for edge in _conflicts(several)}

    def knots(self) -> list[frozenset[int]]:
        """Steps that would each have to come before the other."""
        edges = self._edges
        mutual = [edge for edge in edges if edge[::-1] in edges]
        if mutual:
            return [self._times(one) | self._times(other) for one, other in mutual]
        level = self._levels()
        circle = [step for step in self._all() if step not in level]
        return [frozenset().union(*map(self._times, circle))] if circle else []

    def _times(self, step: _StepKey) -> frozenset[int]:
        return frozenset(self._members[step[0]] if step[1] < 0 else [step[0]])

    def _all(self) -> list[_StepKey]:
        copies = [(time, number) for time, copies in self._copies.items() for number in range(len(copies))]
        return sorted([*copies, *((first, -1) for first in self._members)])

    def _levels(self) -> dict[_StepKey, int]:
        """The level of every step that no circle keeps from having one."""
        waits: dict[_StepKey, int] = dict.fromkeys(self._all(), 0)
        follows: dict[_StepKey, list[_StepKey]] = defaultdict(list)
        for earlier, later in self._edges:
            waits[later] += 1
            follows[earlier].append(later)
        level = {step: 0 for step, count in waits.items() if count == 0}
        ready, at_least = list(level), defaultdict[_StepKey, int](int)
        for step in ready:  # grows while it is walked
            for later in follows[step]:
                waits[later] -= 1
                at_least[later] = max(at_least[later], level[step] + 1)
                if waits[later] == 0:
                    level[later] = at_least[later]
                    ready.append(later)
        return level

    def steps(self) -> list[tuple[int, Step]]:
        """Steps by level, and within one as they were traced."""
        level = self._levels()
        return [(level[step], self._step(step)) for step in sorted(level, key=lambda step: (level[step], step))]

    def _step(self, step: _StepKey) -> Step:
        time, number = step
        return (
            self._copies[time][number] if number >= 0 else _program([self._records[at] for at in self._members[time]])
        )


class _Access(NamedTuple):
    """One step's use of bytes of the model."""

    start: int
    stop: int
    time: int
    step: _StepKey
    writes: bool
    box: Box


def _program(ops: list[Op]) -> Program:
    sources = dict.fromkeys(one.memory.name for op in ops for one in op.reads if one.memory.kind == "source")
    writes = tuple(one for op in ops for one in op.writes if one.memory.kind == "model")
    return Program(tuple(sources), tuple(ops), writes)


def _conflicts(accesses: list[_Access]) -> Iterator[tuple[_StepKey, _StepKey]]:
    accesses.sort(key=lambda access: (access.start, access.stop))
    reaching: list[_Access] = []
    for one in accesses:
        reaching = [other for other in reaching if other.stop > one.start]
        for other in reaching:
            if one.step != other.step and (one.writes or other.writes) and meets(one.box, other.box):
                first, later = (one, other) if one.time < other.time else (other, one)
                yield first.step, later.step
        reaching.append(one)


def _grown(part: _Part, dim: int) -> _Part:
    box = part.source.box
    box = Box(box.dtype, (*box.shape[:dim], 1, *box.shape[dim:]), (*box.stride[:dim], 0, *box.stride[dim:]), box.offset)
    return _Part(
        (*part.start[:dim], 0, *part.start[dim:]),
        (*part.shape[:dim], 1, *part.shape[dim:]),
        Region(part.source.memory, box),
        part.cast,
    )


def _cut(box: Box, parts: Iterable[_Part], wanted: Box) -> list[_Part] | None:
    """The parts that make up a narrowed view of the result; None for views that are more than narrowed."""
    if box.dtype != wanted.dtype or box.stride != wanted.stride or not contiguous(box) or 0 in box.stride:
        return None
    start, rest = [], (wanted.offset - box.offset) // box.dtype.itemsize
    for stride in box.stride:
        at, rest = divmod(rest, stride)
        start.append(at)
    if any(at + length > whole for at, length, whole in zip(start, wanted.shape, box.shape, strict=True)):
        return None
    found: list[_Part] = []
    for part in parts:
        low = tuple(max(a, b) for a, b in zip(start, part.start, strict=True))
        high = tuple(min(a + n, b + m) for a, n, b, m in zip(start, wanted.shape, part.start, part.shape, strict=True))
        lengths = tuple(b - a for a, b in zip(low, high, strict=True))
        if all(length > 0 for length in lengths):
            inner = tuple(a - b for a, b in zip(low, part.start, strict=True))
            source = Region(part.source.memory, narrowed(part.source.box, inner, lengths))
            begin = tuple(a - b for a, b in zip(low, start, strict=True))
            found.append(_Part(begin, lengths, source, part.cast))
    return found


_PLACING = {
    aten.cat.default: _Groups.cat,
    aten.stack.default: _Groups.stack,
    aten.clone.default: _Groups.same,
    aten._to_copy.default: _Groups.same,
}
