"""DisjointSets: what belongs together, found pair by pair."""

from __future__ import annotations

from collections.abc import Iterable


class DisjointSets:
    """Names, joined into sets that have no member in common. Every name is a set of its own until it is joined."""

    def __init__(self) -> None:
        self._above: dict[str, str] = {}

    def of(self, name: str) -> str:
        """The member that stands for the set of ``name``."""
        while (above := self._above.setdefault(name, name)) != name:
            self._above[name] = name = self._above[above]
        return name

    def join(self, names: Iterable[str]) -> None:
        """Make one set of the sets of all ``names``."""
        first = None
        for name in names:
            root = self.of(name)
            if first is None:
                first = root
            self._above[root] = first
