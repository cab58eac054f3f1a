"""Wishes: which tensors and bytes of a version each member of an update wants, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

from ..manifest import TensorSpec
from ..ranges import Range, disjoint
from ..text import some
from .messages import Wanted, words_of
from .peers import Peer


def wishes_of(
    members: Sequence[Peer],
) -> tuple[list[Peer], dict[int, list[tuple[int, tuple[Range, ...]]]], list[int]]:
    """Who asks, by the place of its request; what is wanted of each tensor, by place; and the order of tensors."""
    asking = [peer for peer in members for _ in peer.wanted]  # a relay in a place for each of its workers
    wishes = [wanted for peer in members for wanted in peer.wanted]
    requests: dict[int, list[tuple[int, tuple[Range, ...]]]] = {}
    for place, wish in enumerate(wishes):
        for wanted in wish:
            requests.setdefault(wanted.tensor, []).append((place, wanted.ranges))
    return asking, requests, merged(wishes)


def merged(wishes: Sequence[Sequence[Wanted]]) -> list[int]:
    """One order of tensors, from the order that each of several receivers wants.

    A tensor's place is a fraction of each order's length, and the smallest of these counts: what somebody wants in the
    middle of its order comes by the middle of this one.
    """
    rank: dict[int, float] = {}
    for wish in wishes:
        for place, wanted in enumerate(wish):
            rank[wanted.tensor] = min(rank.get(wanted.tensor, 1.0), place / len(wish))
    return sorted(rank, key=rank.__getitem__)


def unwanted(members: Sequence[Peer], offered: Sequence[TensorSpec]) -> tuple[str, ...]:
    """Names of what no worker asks for. What relays keep beside is not asked for by workers."""
    asked = {wanted.tensor for peer in members for wish in peer.wanted[: len(peer.names)] for wanted in wish}
    return tuple(spec.name for number, spec in enumerate(offered) if number not in asked)


def problem_of(wish: Sequence[Wanted], offered: Sequence[TensorSpec]) -> str:
    """What is wrong with a wish; nothing, if that is empty."""
    numbers = {wanted.tensor for wanted in wish}
    if not numbers <= set(range(len(offered))) or len(numbers) != len(wish):
        return "it wants tensors that were not offered, or one twice"
    for wanted in wish:
        spec, ranges = offered[wanted.tensor], wanted.ranges
        inside = all(part.size and part.fits(spec.nbytes) for part in ranges)
        if ranges and not (inside and disjoint(ranges)):
            shown = some([words_of(part) for part in ranges])
            return f"it wants bytes of {spec} that there are not, or some twice: {shown}"
    return ""
