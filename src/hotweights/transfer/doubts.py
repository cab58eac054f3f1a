"""Doubts: who is in doubt about which update, who is waited for, and what the next lead says to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from .decision import Decision, Known, of_next_lead
from .messages import Account, Past, Seat, Verdict
from .peers import Peer
from .roll import PLACES


class Decided(NamedTuple):
    """What a sender has decided about an update, and about which places."""

    decision: Decision
    places: frozenset[int]


class Doubt(NamedTuple):
    """An update that somebody who is connected has voted for, and does not know the decision about.

    Attributes:
        update: its number.
        version: its name.
        members: all who were to vote.
        told: what each of those said that came back, and the place of its member.
    """

    update: int
    version: str | int
    members: tuple[Seat, ...]
    told: tuple[tuple[int, Known], ...]

    @property
    def decision(self) -> Decision | None:
        """What follows from what was said; ``None`` while others are waited for."""
        return of_next_lead({seat.place: seat.size for seat in self.members}, self.told)

    @property
    def absent(self) -> tuple[str, ...]:
        """The names of the members that have not come back, or not with all of their processes."""
        counts = Counter(place for place, _ in self.told)
        missing = [seat for seat in self.members if counts[seat.place] < seat.size]
        return tuple(seat.name or f"place {seat.place}" for seat in missing)

    def __str__(self) -> str:
        counts = Counter(outcome for _, outcome in self.told)
        said = ", ".join(f"{counts[outcome]} {outcome.value}" for outcome in Known if counts[outcome])
        waits = f"; waiting for {', '.join(self.absent)}" if self.absent and self.decision is None else ""
        return f"version {self.version!r}: {said}{waits}"


def doubts_of(peers: Iterable[Peer]) -> list[Doubt]:
    """What those who are connected are in doubt about."""
    accounts = [account for peer in peers for account in peer.accounts]
    doubts = []
    for update in dict.fromkeys(account.update for account in accounts if account.outcome is Known.IN_DOUBT):
        of_it = [account for account in accounts if account.update == update]
        members = max((account.members for account in of_it), key=len)
        told = tuple((account.place, account.outcome) for account in of_it for _ in range(_counted(account)))
        doubts.append(Doubt(update, of_it[0].version, members, told))
    return doubts


def _counted(account: Account) -> int:
    return min(max(account.count, 1), PLACES)


def tell(peers: Iterable[Peer], decided: Mapping[int, Decided], *, last: bool = False) -> list[Doubt]:
    """Say to those in doubt what is decided; with ``last`` also that it is not known. Returns what is open still.

    Args:
        peers: who is connected. None of them takes part in an update now.
        decided: what this process decided itself, by update.
        last: whether nobody else is waited for.
    """
    listed = list(peers)
    still = []
    for doubt in doubts_of(listed):
        own = decided.get(doubt.update)
        if own is None and doubt.decision is None:
            still.append(doubt)
            if not last:
                continue
        for peer in listed:
            _answer(peer, doubt, own)
    return still


def _answer(peer: Peer, doubt: Doubt, own: Decided | None) -> None:
    for account in peer.accounts:
        if account.update != doubt.update or account.outcome is not Known.IN_DOUBT:
            continue
        decision = doubt.decision
        if own is not None:  # It is about those that were prepared to the end.
            decision = own.decision if account.place in own.places else Decision.ABORT
        peer.channel.send(Verdict(doubt.update, decision))
        break
    peer.accounts = tuple(
        account for account in peer.accounts if (account.update, account.outcome) != (doubt.update, Known.IN_DOUBT)
    )


def is_in_doubt(peer: Peer) -> bool:
    """Whether it was not answered yet, or one of those behind it."""
    return any(account.outcome is Known.IN_DOUBT for account in peer.accounts)


def forward(peers: Iterable[Peer], verdict: Verdict) -> None:
    """Pass on what the lead says to those in doubt behind a relay."""
    for peer in peers:
        if any((account.update, account.outcome) == (verdict.about, Known.IN_DOUBT) for account in peer.accounts):
            peer.channel.send(verdict)
            told = (_told(account, verdict) for account in peer.accounts)
            peer.accounts = tuple(account for account in told if account is not None)


def _told(account: Account, verdict: Verdict) -> Account | None:
    """The account of who is told now what became of the update, if it is."""
    if account.update != verdict.about:
        return account
    if verdict.decision is None:
        return None
    outcome = Known.COMMITTED if verdict.decision is Decision.COMMIT else Known.KEPT
    return replace(account, outcome=outcome, members=())


def past_of(peers: Sequence[Peer]) -> Past:
    """What all of them know, for the lead of a relay."""
    epoch = max((peer.epoch for peer in peers), default=0)
    counts: dict[Account, int] = {}
    for account in (account for peer in peers for account in peer.accounts):
        alike = replace(account, count=1)
        counts[alike] = counts.get(alike, 0) + _counted(account)
    return Past(epoch, tuple(replace(account, count=count) for account, count in counts.items()))
