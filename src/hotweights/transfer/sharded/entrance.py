"""Entrance: where the ranks of a sharded trainer come to the one that leads, and which of them each is."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from ... import signals
from ...errors import PeerLost, ProtocolError
from ..address import check_peer
from ..audience import Audience
from ..network import NetworkDoor
from .known_rank import KnownRank
from .link import Link
from .meeting_place import Accepting, MeetingPlace
from .network_link import NetworkLink
from .words import Join, Word

_SHOWN = 20  # of those that were sent away


@signals.held_throughout
class Entrance:
    """Open until all ranks are there. Owns its sockets, and the connections of who has not said which rank it is.

    Attributes:
        ranks: those that came, by their number. Their connections are the lead's.
        refused: why others were sent away, the last of them.
        audience: where ranks come by the doors of receivers, these; ``None`` otherwise.
    """

    def __init__(self, places: Sequence[MeetingPlace], size: int) -> None:
        """Listen there, for the ranks of a group of this ``size``.

        Raises:
            AddressTaken: another sender is there.
            UsageError: nobody can listen there.
        """
        self.ranks: dict[int, KnownRank] = {}
        self.refused: list[str] = []
        self.audience: Audience | None = None
        self._size = size
        self._strangers: list[tuple[Link, int]] = []
        self._listeners: list[Accepting] = []
        try:
            for where in places:
                self._listeners.append(where.listen())
        except BaseException:
            self.close()
            raise

    @property
    def doors(self) -> list[NetworkDoor]:
        """Where receivers come in, and ranks of other hosts beside them."""
        return [] if self.audience is None else self.audience.doors

    @property
    def missing(self) -> list[int]:
        """The ranks that are not there."""
        return [number for number in range(1, self._size) if number not in self.ranks]

    def sockets(self) -> list[tuple[socket.socket, bool]]:
        """What to wait for before ``admit``."""
        waiting = [(each, False) for listener in self._listeners for each in listener.sockets()]
        return [*waiting, *self.flow_sockets(), *((link.socket, link.unsent) for link, _ in self._strangers)]

    def flow_sockets(self) -> list[tuple[socket.socket, bool]]:
        """What to wait for before ``admit_flows``."""
        return [(waiting, False) for door in self.doors for waiting in door.sockets()]

    def admit_flows(self) -> None:
        """Take connections for bytes, which come by the doors of receivers."""
        if self.audience is not None:
            self.audience.admit()

    def admit(self) -> None:
        """Take those who connect, and hear which rank each of them is."""
        for listener in self._listeners:
            while (accepted := listener.accept()) is not None:
                try:
                    self._strangers.append((Link(accepted), check_peer(accepted)))
                except ProtocolError:
                    accepted.close()
        self.admit_flows()
        for door in self.doors:
            self._strangers += [(NetworkLink(waiting, tls), 0) for waiting, tls in door.take_ranks()]
        for stranger in list(self._strangers):
            self._hear(stranger)
        for number, rank in list(self.ranks.items()):  # One that gave up is waited for again.
            try:
                rank.link.read()
            except (PeerLost, ProtocolError):
                rank.close()
                del self.ranks[number]

    def _hear(self, stranger: tuple[Link, int]) -> None:
        link, pid = stranger
        try:
            link.flush()
            if (word := link.read()) is None:
                return
            self._place(link, pid, word)
        except (PeerLost, ProtocolError) as error:
            self.refused = [*self.refused, f"{link.host or f'process {pid}'}: {error}"][-_SHOWN:]
            link.say_goodbye(str(error))
        self._strangers.remove(stranger)

    def _place(self, link: Link, pid: int, word: Word) -> None:
        if not isinstance(word, Join):
            raise ProtocolError("a rank says first which it is")
        if word.size != self._size or not 0 < word.rank < word.size:
            raise ProtocolError(
                f"rank {word.rank} of {word.size} came to rank 0 of {self._size}: its process group is a stale one, or "
                "another"
            )
        if word.rank in self.ranks:
            raise ProtocolError(f"rank {word.rank} is here already: {self.ranks[word.rank].name}; end one of the two")
        self.ranks[word.rank] = KnownRank(word.rank, link, pid or word.pid)

    def close(self) -> None:
        """Nobody comes in any more. May be called twice."""
        for link, _ in self._strangers:
            link.close()
        self._strangers.clear()
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for door in self.doors:
            door.turn_ranks_away()
        self.audience = None
