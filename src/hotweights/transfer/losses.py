"""Losses: who was lost of one update, why, and whether it is known what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable

from .peers import Peer

UNKNOWN = "it may have voted, and be in doubt: whether it takes the version is not known here"
"""What is said of who was lost when others went on, and has perhaps consented to that."""


class Losses:
    """Who was lost of one update, by name. It is as long as there are such."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}
        self._doubtful: set[str] = set()
        self._prepared: list[str] = []

    def add(self, peer: Peer, reason: str, *, doubtful: bool) -> None:
        """A member is lost. ``doubtful``: it may be in doubt, as may those behind it."""
        self._reasons.setdefault(peer.name, reason)
        if "prepared" in peer.said:
            self._prepared.append(peer.name)
        if doubtful:
            self._doubtful.update((peer.name, *peer.names))

    def __len__(self) -> int:
        return len(self._reasons)

    def reason(self, peer: Peer) -> str:
        """Why a member was lost."""
        return self._reasons[peer.name]

    @property
    def told(self) -> list[str]:
        """Who was lost and why, in a line for each."""
        return [f"{name}: {reason}" for name, reason in self._reasons.items()]

    @property
    def gave_up(self) -> list[str]:
        """As ``told``: those that were lost when they were prepared."""
        return [f"{name}: it gave up waiting for the decision: {self._reasons[name]}" for name in self._prepared]

    @property
    def reported(self) -> dict[str, str]:
        """Reasons by name, for those who read a report: the others went on."""
        return {name: self.shown(name, reason) for name, reason in self._reasons.items()}

    def shown(self, name: str, reason: str) -> str:
        """Why somebody was lost that the others went on without, and whether it is known what becomes of it."""
        return f"{reason}; {UNKNOWN}" if name in self._doubtful else reason


def dropped(members: Iterable[Peer]) -> dict[str, str]:
    """Who behind relays was lost before the vote, and why."""
    return {peer.placed(name): why for peer in members for name, why in peer.dropped}


def fallen(members: Iterable[Peer]) -> dict[str, str]:
    """Who behind relays was lost after it, and why."""
    return {peer.placed(name): why for peer in members for name, why in peer.fallen}
