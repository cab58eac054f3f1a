"""DisjointSets: what belongs together, found pair by pair."""

from __future__ import annotations

from collections.abc import Iterable


class _Together:
    """Names that were joined, by one of them."""

    def __init__(self) -> None:
        self._above: dict[str, str] = {}

    def of(self, name: str) -> str:
        while (above := self._above.setdefault(name, name)) != name:
            self._above[name] = name = self._above[above]
        return name

    def join(self, names: Iterable[str]) -> None:
        first = None
        for name in names:
            root = self.of(name)
            if first is None:
                first = root
            self._above[root] = first
