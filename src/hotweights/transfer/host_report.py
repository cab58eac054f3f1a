"""HostReport: what one version took on one host. Pace: where an update notes it, member by member."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from ..text import size
from ..timeline import TimelineEvent
from .peers import Peer

PHASES = {"accept": "answer the offer", "release": "take bytes", "prepared": "prepare", "done": "commit"}
"""What a member does until it says these words."""


@dataclass(frozen=True, slots=True)
class HostReport:
    """What one version took on one host.

    Attributes:
        host: its name, by its certificate or address; empty for the sender's own.
        members: who took part there; a relay is one.
        workers: how many those are, with the workers behind a relay.
        network_nbytes: bytes that were sent to it.
        shared_nbytes: bytes that its workers read in memory which they share with the sender or a relay, counted for
            each worker.
        phases: seconds of each, until the last of its members was through.
        events: the phases of each member, on the clock of ``SendReport.events``.
    """

    host: str
    members: tuple[str, ...]
    workers: int
    network_nbytes: int
    shared_nbytes: int
    phases: dict[str, float]
    events: tuple[TimelineEvent, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """The attributes but the events, as JSON can hold them."""
        names = ("host", "workers", "network_nbytes", "shared_nbytes", "phases")
        return {**{name: getattr(self, name) for name in names}, "members": list(self.members)}

    def __str__(self) -> str:
        workers = f"{self.workers} worker{'s' if self.workers != 1 else ''}"
        moved = [f"{size(self.network_nbytes)} over the network"] if self.network_nbytes else []
        moved += [f"{size(self.shared_nbytes)} read in shared memory by {workers}"] if self.shared_nbytes else []
        phases = ", ".join(f"{what} {seconds:.3f} s" for what, seconds in self.phases.items())
        return f"{self.host or 'this one'}: {', '.join(moved) or workers}; {phases}"


class Pace:
    """Notes when each member was through with each phase of one update. One thread uses it."""

    def __init__(self) -> None:
        self._began: dict[str, float] = {}  # by phase
        self._spans: dict[Peer, dict[str, tuple[float, float]]] = {}
        self._shared: dict[Peer, int] = {}

    def begin(self, word: str) -> None:
        """From now on members are waited for to say this word. Only the first call counts."""
        self._began.setdefault(PHASES[word], time.perf_counter())

    def heard(self, peer: Peer, word: str) -> None:
        """It said the word; of several, the last counts."""
        phase = PHASES.get(word, "")
        if phase in self._began:
            spans = self._spans.setdefault(peer, {})
            # A slot may be released after the end was told: what a member does, it does one after the other.
            earlier = max((end for what, (_, end) in spans.items() if what != phase), default=0.0)
            spans[phase] = max(self._began[phase], earlier), time.perf_counter()

    def shared(self, peer: Peer, nbytes: int) -> None:
        """So many bytes are read in shared memory there."""
        if peer.channel.shares or peer.crew:
            self._shared[peer] = self._shared.get(peer, 0) + nbytes

    def reports(self, members: Iterable[Peer], began: float) -> tuple[HostReport, ...]:
        """One for each host of these members, by name. ``began``: when the timeline did, by ``time.perf_counter``."""
        by_host: dict[str, list[Peer]] = {}
        for peer in members:
            by_host.setdefault(peer.channel.host, []).append(peer)
        return tuple(self._report(host, by_host[host], began) for host in sorted(by_host))

    def _report(self, host: str, peers: list[Peer], timeline_began: float) -> HostReport:
        events = tuple(
            TimelineEvent(what, peer.name, began - timeline_began, ended - began)
            for peer in peers
            for what, (began, ended) in self._spans.get(peer, {}).items()
        )
        phases = {
            what: max(event.seconds for event in events if event.what == what)
            for what in PHASES.values()
            if any(event.what == what for event in events)
        }
        return HostReport(
            host,
            tuple(peer.name for peer in peers),
            sum(max(1, len(peer.crew)) for peer in peers),
            sum(peer.network_nbytes for peer in peers),
            sum(self._shared.get(peer, 0) for peer in peers),
            phases,
            events,
        )
