"""Ordering: which nodes must come before which, the level of each, and the cycles that leave some without one."""

from __future__ import annotations

import graphlib
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from ..boxes import Box, extent, meets

Edge = tuple[int, int]
"""Two nodes, the first of which must be done before the second begins."""


class Use(NamedTuple):
    """One node's use of bytes of one tensor of the model."""

    node: int
    time: int
    writes: bool
    box: Box


def conflicts(uses: Collection[Use]) -> Iterator[Edge]:
    """An edge for every two nodes of which one writes what the other writes or reads, by the times of both."""
    if len(uses) < 2:
        return
    reaching: list[tuple[int, Use]] = []  # those that end behind the start of the one at hand, and where
    for start, stop, use in sorted(((*extent(use.box), use) for use in uses), key=lambda span: span[:2]):
        reaching = [(end, other) for end, other in reaching if end > start]
        for _, other in reaching:
            if use.node != other.node and (use.writes or other.writes) and meets(use.box, other.box):
                yield (use.node, other.node) if use.time < other.time else (other.node, use.node)
        reaching.append((stop, use))


def levels(edges: Iterable[Edge]) -> dict[int, int]:
    """The level of every node that has an edge: one more than the highest that must come before it; the lowest is 0.

    Raises:
        graphlib.CycleError: there are nodes that would each have to come before the other.
    """
    sorter: graphlib.TopologicalSorter[int] = graphlib.TopologicalSorter()
    for earlier, later in edges:
        sorter.add(later, earlier)
    sorter.prepare()
    level: dict[int, int] = {}
    for number in itertools.count():
        ready = sorter.get_ready()
        if not ready:
            break
        level.update(dict.fromkeys(ready, number))
        sorter.done(*ready)
    return level


def cycles(edges: Iterable[Edge]) -> list[list[int]]:
    """Nodes that would each have to come before all others of their list.

    They are the strongly connected components with more than one node, found as Kosaraju does.
    """
    after: dict[int, list[int]] = defaultdict(list)
    before: dict[int, list[int]] = defaultdict(list)
    for earlier, later in sorted(edges):
        after[earlier].append(later)
        before[later].append(earlier)
    order = list(_visited(list(after), after, set()))
    seen: set[int] = set()
    components = (list(_visited([node], before, seen)) for node in reversed(order))
    return [component for component in components if len(component) > 1]


def _visited(roots: Iterable[int], neighbours: Mapping[int, Iterable[int]], seen: set[int]) -> Iterator[int]:
    """Depth first, every node that is not in ``seen``, behind all that it leads to."""
    stack = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += ((neighbour, False) for neighbour in neighbours.get(node, ()))
