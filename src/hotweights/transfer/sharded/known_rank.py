"""KnownRank: a rank of a sharded trainer, as the one that leads knows it. RankWatch: which of them said something."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterable
from typing import Any

from ... import signals
from ..channel import close_in_children
from ..slot_flow import SlotInflow
from .link import Link
from .words import Checked, Compared, Described, Here, Leave


class KnownRank:
    """A rank, as the lead knows it.

    Attributes:
        rank: in the group.
        link: to it.
        name: for people.
        flow: for bytes, of a rank on another host.
        here: what it last said that it sends.
        left: the last round that it gave up, and why.
        described: what it last said it holds.
        compared: the digests that it said last.
        checked: what was last written while it was read.
        mapped: whether it has the slots.
        port: where receivers can come to it, on its host; 0 if they cannot.
    """

    def __init__(self, rank: int, link: Link, pid: int) -> None:
        where = f" on {link.host}" if link.host else ""
        self.rank, self.link, self.name = rank, link, f"rank {rank} (process {pid}{where})"
        self.flow = None if link.shares else SlotInflow()
        self.here: Here | None = None
        self.left: Leave | None = None
        self.described: Described | None = None
        self.compared: Compared | None = None
        self.checked: Checked | None = None
        self.mapped = False
        self.port = 0

    @property
    def ready(self) -> bool:
        """Whether it can fill slots."""
        return self.mapped and (self.flow is None or self.flow.connection is not None)

    @property
    def sockets(self) -> list[socket.socket]:
        """What it speaks through: its link, and its flow."""
        flow = None if self.flow is None else self.flow.connection
        return [self.link.socket] if flow is None else [self.link.socket, flow]

    def close(self) -> None:
        """End its connections."""
        self.link.close()
        if self.flow is not None:
            self.flow.close()


@signals.held_throughout
class RankWatch:
    """From which ranks something came. It asks none of them: 256 reads take as long as it takes to fill a slot.

    Owns a descriptor; close it.
    """

    def __init__(self, ranks: Iterable[KnownRank]) -> None:
        self._poll = select.epoll()
        self._ranks = {connected.fileno(): rank for rank in ranks for connected in rank.sockets}
        for number in self._ranks:
            self._poll.register(number, select.EPOLLIN)
        close_in_children(self)

    def wanted(self) -> tuple[Any, bool]:
        """What to wait for: it can be read from when something came from any of them."""
        return self._poll, False

    def spoken(self) -> set[KnownRank]:
        """Those from which something came."""
        return {self._ranks[number] for number, _ in self._poll.poll(0) if number in self._ranks}

    def forget_rank(self, rank: KnownRank) -> None:
        """It is watched no more. Called before its sockets are closed: copies in a child would be heard for ever."""
        for number in [number for number, its in self._ranks.items() if its is rank]:
            del self._ranks[number]
            with contextlib.suppress(OSError):
                self._poll.unregister(number)

    def close(self) -> None:
        """Let go. May be called twice."""
        self._poll.close()

    forget = close
