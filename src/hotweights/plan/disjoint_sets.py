"""DisjointSets: what belongs together, found pair by pair."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, TypeVar

M = TypeVar("M", bound=Hashable)


class DisjointSets:
    """Sets that have no member in common. Every value is a set of its own until it is joined with others."""

    def __init__(self) -> None:
        self._above: dict[Any, Any] = {}

    def of(self, member: M) -> M:
        """The member that stands for the set of ``member``."""
        while (above := self._above.setdefault(member, member)) != member:
            self._above[member] = member = self._above[above]
        return member

    def join(self, members: Iterable[Hashable]) -> None:
        """Make one set of the sets of all ``members``."""
        first = None
        for member in members:
            root = self.of(member)
            if first is None:
                first = root
            self._above[root] = first
