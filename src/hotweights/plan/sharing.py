"""Sharing: which targets lie in one memory, and which of them holds the bytes that are written."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch.utils._pytree import tree_map

from ..boxes import Box, Memory, Region, extent, moved
from .steps import Op, Program, Target

T = TypeVar("T")


class Sharing:
    """The targets that share memory with others, over or beside them."""

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self._targets = targets
        boxes: dict[str, list[tuple[Box, str]]] = defaultdict(list)
        for name, target in targets.items():
            if target.memory and target.owner == name:
                boxes[target.memory].append((moved(target.box, target.start), name))
        self._intervals = {memory: _Intervals(several) for memory, several in boxes.items()}

    def homes(self, name: str, box: Box) -> list[tuple[str, Box]]:
        """Which targets hold the bytes of a box.

        Args:
            name: a target.
            box: counted from the target's first byte; it may reach beyond the target on both sides.

        Returns:
            The target that holds all of the box, and the box counted from that target's first byte. Of several such
            targets it is the one that begins first, and of those the largest. If no target holds all of the box: each
            that holds a part, with the bytes of that part.
        """
        target = self._targets.get(name)
        if target is None or not target.memory:
            return [(name, box)]
        box = moved(box, target.start)
        start, stop = extent(box)
        near = list(self._intervals[target.memory].meeting(start, stop))
        for low, high, other in near:
            if low <= start and stop <= high:
                return [(other, moved(box, -self._targets[other].start))]
        parts = [(max(start, low), min(stop, high), other) for low, high, other in near]
        inside = [(other, Box(torch.uint8, (b - a,), (1,), a - self._targets[other].start)) for a, b, other in parts]
        return inside or [(name, moved(box, -target.start))]

    def at_home(self, program: Program) -> Program:
        """The program with each region of the model under the name of the target that holds it."""
        if not self._intervals or not any(
            self._moved(region) is not region for op in program.ops for region in op.reads
        ):
            return program
        return Program(program.sources, tuple(map(self._op, program.ops)), tuple(map(self._moved, program.writes)))

    def _op(self, op: Op) -> Op:
        parts = (op.args, op.kwargs, op.results, op.writes, op.reads)
        return Op(op.func, *(tree_map(self._moved, part) for part in parts))

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, Region) or value.memory.kind != "model":
            return value
        homes = self.homes(value.memory.name, value.box)
        if len(homes) > 1 or homes[0][0] == value.memory.name:
            return value
        return Region(Memory("model", homes[0][0]), homes[0][1])

    def pooled(self, writes: Iterable[tuple[str, Box]]) -> Callable[[str], list[Box]]:
        """A function that gives what is written to a target's bytes under any name, counted from its first byte."""
        boxes: dict[str, list[tuple[Box, Box]]] = defaultdict(list)
        for name, box in writes:
            target = self._targets[name]
            if target.memory:
                box = moved(box, target.start)
                boxes[target.memory].append((box, box))
        intervals = {memory: _Intervals(several) for memory, several in boxes.items()}

        def to(name: str) -> list[Box]:
            target = self._targets[name]
            if target.memory not in intervals:
                return []
            meeting = intervals[target.memory].meeting(*extent(moved(target.box, target.start)))
            return [moved(box, -target.start) for *_, box in meeting]

        return to


class _Intervals(Generic[T]):
    """What lies where in one memory: the first byte, the byte after the last, and the item that lies there."""

    def __init__(self, several: Iterable[tuple[Box, T]]) -> None:
        spans = [(*extent(box), item) for box, item in several]
        # Of two that begin together the larger comes first: what is written belongs to that.
        self._spans = sorted(spans, key=lambda span: (span[0], -span[1]))
        self._starts = [start for start, *_ in self._spans]
        self._longest = max((stop - start for start, stop, _ in spans), default=0)

    def meeting(self, start: int, stop: int) -> Iterator[tuple[int, int, T]]:
        """The items with bytes between ``start`` and ``stop``, and where they lie."""
        first, last = bisect_left(self._starts, start - self._longest), bisect_left(self._starts, stop)
        return (span for span in self._spans[first:last] if span[1] > start)
