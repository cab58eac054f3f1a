"""Direct: which receivers take bytes from which ranks of other hosts themselves, so that they do not go by rank 0's."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable
from weakref import WeakKeyDictionary

from ...notices import log
from ...text import some
from ..carriers.sockets import SocketOutflow
from ..flow import TOKEN
from ..messages import Origin
from ..network_channel import host_of
from ..peers import Peer
from .known_rank import KnownRank
from .words import Dismiss, Expect

PATIENCE = 3.0
"""Seconds in which a receiver comes to the ranks, the first time. Thousandths are enough where nothing is busy."""


class Direct:
    """The pairs of a receiver and a rank that are connected; asked anew for each version."""

    def __init__(self) -> None:
        self.ranks: dict[int, KnownRank] = {}  # to whom receivers can come
        self._tokens: WeakKeyDictionary[Peer, dict[int, bytes]] = WeakKeyDictionary()  # by rank
        self._tried: WeakKeyDictionary[Peer, set[int]] = WeakKeyDictionary()  # ranks that were waited for in vain
        self._peers: dict[int, Peer] = {}  # by place
        self._met: set[tuple[int, int]] = set()  # place and rank
        self._waiting: set[tuple[int, int]] = set()  # those that may come still
        self._settled: frozenset[tuple[int, int]] = frozenset()
        self._round = 0

    def begin(self, round: int, ranks: Iterable[KnownRank], members: Iterable[Peer]) -> None:
        """The ranks hear which receivers may come to them."""
        self._round, self._met, self._settled = round, set(), frozenset()
        self.ranks = {rank.rank: rank for rank in ranks if rank.port and rank.flow is not None}
        # Who asked for another carrier gets everything by that.
        self._peers = {peer.place: peer for peer in members if type(peer.flow) is SocketOutflow}
        for peer in self._peers.values():
            own = self._tokens.setdefault(peer, {})
            for rank in self.ranks:
                own.setdefault(rank, secrets.token_bytes(TOKEN))
        for number, known in self.ranks.items():
            tokens = tuple((place, self._tokens[peer][number]) for place, peer in self._peers.items())
            known.link.send(Expect(round, tokens))
        self._waiting = {
            (place, number)
            for place, peer in self._peers.items()
            for number in self.ranks.keys() - self._tried.get(peer, set())
        }

    def origins(self, peer: Peer) -> tuple[Origin, ...]:
        """What this receiver is told of them."""
        if self._peers.get(peer.place) is not peer:
            return ()
        return tuple(
            Origin(number, rank.name, host_of(rank.link.socket), rank.port, self._tokens[peer][number])
            for number, rank in self.ranks.items()
        )

    def note(self, rank: int, places: Iterable[int]) -> None:
        """These have come to a rank."""
        pairs = {(place, rank) for place in places}
        self._met |= pairs
        self._waiting -= pairs

    @property
    def unsure(self) -> bool:
        """Whether some may come still."""
        return bool(self._waiting)

    def settle(self) -> None:
        """Whoever has come by now takes bytes of this version so."""
        self._settled = frozenset(self._met)
        late: dict[int, list[int]] = {}
        for place, rank in sorted(self._waiting):
            late.setdefault(place, []).append(rank)
        for place, ranks in late.items():
            peer, which = self._peers[place], some([str(rank) for rank in ranks])
            self._tried.setdefault(peer, set()).update(ranks)
            log(
                logging.WARNING,
                "%s did not reach rank %s of the trainer at its host; bytes go by way of rank 0",
                peer.name,
                which,
            )

    def reaches(self, peer: Peer, rank: int) -> bool:
        """Whether the rank sends to this receiver itself."""
        return (peer.place, rank) in self._settled and self._peers.get(peer.place) is peer

    def dismiss(self, peer: Peer) -> None:
        """A receiver was lost. What ranks still have for it is not sent."""
        if self._peers.get(peer.place) is peer:
            del self._peers[peer.place]
            self._waiting -= {pair for pair in self._waiting if pair[0] == peer.place}
            self._tokens.pop(peer, None)
            for rank in self.ranks.values():
                rank.link.send(Dismiss(self._round, peer.place))
