"""Lowering: the record of a trace becomes steps: copies of slices where bytes are only moved, programs elsewhere.

Operations that share an intermediate result, or a source that one of them changes, become one program. Steps of which
one writes what another writes or reads keep their order: each has a level, and runs when all lower levels are done.
"""

from __future__ import annotations

import graphlib
from collections import defaultdict
from collections.abc import Collection, Container, Iterable, Sequence
from typing import NamedTuple

from ..boxes import Memory
from ..plan.disjoint_sets import DisjointSets
from ..plan.steps import Copy, Op, Program, Step
from .ordering import Edge, Use, conflicts, cycles, levels
from .placing import Placing


class _Node(NamedTuple):
    """A step in the making.

    Attributes:
        times: of its operations: their places in the record, in order.
        copy: what it does, if it is one; else it is a program.
    """

    times: Sequence[int]
    copy: Copy | None

    def step(self, records: Sequence[Op]) -> Step:
        """The step."""
        return _program([records[time] for time in self.times]) if self.copy is None else self.copy


def lower(records: Sequence[Op]) -> list[tuple[int, Step]]:
    """The steps of a record with their levels: by level, and within one as they were traced."""
    together: list[frozenset[int]] = []  # Times that must be one program: else others would have to come between them.
    while True:
        nodes = _nodes(records, together)
        edges = _edges(records, nodes)
        try:
            level = levels(edges)
        except graphlib.CycleError:
            together += (frozenset(time for node in cycle for time in nodes[node].times) for cycle in cycles(edges))
            continue
        order = sorted(range(len(nodes)), key=lambda node: level.get(node, 0))
        return [(level.get(node, 0), nodes[node].step(records)) for node in order]


def _nodes(records: Sequence[Op], together: Collection[frozenset[int]]) -> list[_Node]:
    """The record as nodes, in the order of their first operations."""
    nodes: list[_Node] = []
    others: list[int] = []
    kept = frozenset().union(*together)
    placing = Placing(records)
    for time, op in enumerate(records):
        copies = placing.copies(op) if time not in kept else None
        if copies is not None:
            nodes += (_Node((time,), copy) for copy in copies)
        else:
            placing.see(op)
            others.append(time)
    nodes += (_Node(times, None) for times in _gathered(records, _live(records, others), together, placing.changed))
    return sorted(nodes, key=lambda node: node.times[0])


def _live(records: Sequence[Op], times: Sequence[int]) -> list[int]:
    """Those of the operations that the model gets something from."""
    wanted: set[Memory] = set()
    live: list[int] = []
    for time in reversed(times):
        op = records[time]
        made = (*op.results, *op.writes)
        if any(region.memory.kind == "model" for region in op.writes) or any(
            region.memory in wanted for region in made
        ):
            live.append(time)
            wanted.update(region.memory for region in op.reads if region.memory.kind != "model")
    return live[::-1]


def _gathered(
    records: Sequence[Op], times: Sequence[int], together: Iterable[frozenset[int]], changed: Container[Memory]
) -> Iterable[list[int]]:
    """The operations that make up one program each."""
    sets = DisjointSets()
    last: dict[Memory, int] = {}
    for time in times:
        op = records[time]
        for region in (*op.reads, *op.results):
            memory = region.memory
            if memory.kind == "model" or (memory.kind == "constant" and memory not in changed):
                continue
            sets.join((last.get(memory, time), time))
            last[memory] = time
    for joined in together:
        sets.join(time for time in times if time in joined)
    programs: dict[int, list[int]] = defaultdict(list)
    for time in times:
        programs[sets.of(time)].append(time)
    return programs.values()


def _edges(records: Sequence[Op], nodes: Sequence[_Node]) -> set[Edge]:
    """Which nodes must come before which."""
    uses: dict[str, list[Use]] = defaultdict(list)
    for number, node in enumerate(nodes):
        if node.copy is not None:
            assert node.copy.into is not None
            uses[node.copy.destination].append(Use(number, node.times[0], True, node.copy.into))
            continue
        for time in node.times:
            op = records[time]
            for region in op.reads:
                if region.memory.kind == "model":
                    uses[region.memory.name].append(Use(number, time, region in op.writes, region.box))
    return {edge for several in uses.values() for edge in conflicts(several)}


def _program(ops: Sequence[Op]) -> Program:
    sources = dict.fromkeys(region.memory.name for op in ops for region in op.reads if region.memory.kind == "source")
    writes = tuple(region for op in ops for region in op.writes if region.memory.kind == "model")
    return Program(tuple(sources), tuple(ops), writes)
