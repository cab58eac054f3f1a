"""Origins: a receiver's connections to those ranks of a sharded trainer that send bytes of slots themselves."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Iterator, Sequence

import torch

from .. import signals
from ..boxes import Box
from ..errors import PeerLost, ProtocolError
from ..notices import log
from .flow import Greeting, Waitable
from .messages import Chunk, Filled, Origin
from .slot_flow import SlotInflow

_GRACE = 5.0  # seconds in which the sender says why a rank is gone


@signals.held_throughout
class OriginInflow(SlotInflow):
    """The receiver's end of a connection to one rank. Nothing of it raises that the rank is gone.

    Attributes:
        origin: which rank.
        lost: why nothing comes of it any more; empty if that is not so.
        since: when that was found out.
    """

    def __init__(self, origin: Origin) -> None:
        """Begin to connect."""
        super().__init__()
        self.origin, self.token = origin, origin.token
        self.lost, self.since = "", 0.0
        self._last = 0
        self._greeting = Greeting(origin.token)
        family = socket.AF_INET6 if ":" in origin.host else socket.AF_INET
        try:
            self.attach(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK))
            assert self._socket is not None
            with contextlib.suppress(BlockingIOError):
                self._socket.connect((origin.host, origin.port))
        except OSError as error:
            self._lose(str(error))

    @property
    def awaited(self) -> tuple[Waitable, bool] | None:
        """What to wait for, and whether until it can be written to; ``None`` if nothing is expected."""
        if self.lost or self._socket is None or not (self._greeting.pending or self.expects):
            return None
        return self._socket, self._greeting.pending

    @property
    def expects(self) -> bool:
        """Whether something is expected."""
        return bool(self._expected) or self._coming is not None

    def greet(self) -> bool:
        """Say to the rank who this is. Returns whether that is said."""
        if self.lost or self._socket is None:
            return False
        try:
            return self._greeting.say(self._socket)
        except PeerLost as error:
            self._lose(str(error))
            return False

    def expect(self, number: int, slot: int, memory: torch.Tensor, landings: Sequence[Box]) -> None:
        """As of every slot's flow. What has a larger number than this is left until it is expected, too."""
        super().expect(number, slot, memory, landings)
        self._last = number

    def fill(self) -> list[tuple[int, int]]:
        """As of every slot's flow."""
        if not self.expects or not self.greet():
            return []
        try:
            return super().fill()
        except PeerLost as error:
            self._lose(str(error))
            return []

    def look(self) -> None:
        """Find out whether the rank has ended the connection: it refuses who comes before it hears of the token."""
        if self.lost or self._socket is None or self._greeting.pending:
            return
        try:
            if not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                self._lose("it closed the connection")
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(str(error))

    def _lose(self, reason: str) -> None:
        self.lost, self.since = reason, time.monotonic()


@signals.held_throughout
class Origins:
    """The ranks that the last offer named. Owns connections; close it."""

    def __init__(self) -> None:
        self._flows: dict[int, OriginInflow] = {}  # by rank
        self._lacking: dict[int, set[int]] = {}  # by fill, the ranks whose bytes are not there
        self._logged = False

    @property
    def lacking(self) -> bool:
        """Whether something is expected that is not there."""
        return any(self._lacking.values())

    def meet(self, origins: Sequence[Origin]) -> None:
        """Connect to those that are new or were lost, and let go of those that are no more."""
        self.drop()
        named = {origin.token for origin in origins}
        for rank, flow in list(self._flows.items()):
            flow.look()
            if flow.token not in named or flow.lost:
                flow.close()
                del self._flows[rank]
        for origin in origins:
            if origin.rank not in self._flows:
                self._flows[origin.rank] = OriginInflow(origin)

    def greet(self) -> None:
        """Say to all of them who this is, as far as they are reached."""
        for flow in self._flows.values():
            if not flow.greet() and flow.lost and not self._logged:
                self._logged = True  # Of 256 that a firewall keeps away one is enough.
                log(
                    logging.WARNING,
                    "%s cannot be reached at %s, port %d; what it holds comes by way of rank 0: %s",
                    flow.origin.name,
                    flow.origin.host,
                    flow.origin.port,
                    flow.lost,
                )

    @property
    def awaited(self) -> Iterator[tuple[Waitable, bool]]:
        """What to wait for, and whether until it can be written to."""
        return filter(None, (flow.awaited for flow in self._flows.values()))

    def expect(self, filled: Filled, memory: torch.Tensor) -> Sequence[Chunk]:
        """Have them fill their part of a slot. Returns the chunks that the sender sends itself.

        Raises:
            ProtocolError: it names a rank that was not offered.
        """
        if not filled.origins:
            return filled.chunks
        if len(filled.origins) != len(filled.chunks) or not self._flows.keys() >= {*filled.origins} - {0}:
            raise ProtocolError(f"bytes of slot {filled.slot} were to come from ranks that were not named")
        parts: dict[int, list[Chunk]] = {}
        for chunk, rank in zip(filled.chunks, filled.origins, strict=True):
            parts.setdefault(rank, []).append(chunk)
        ours = parts.pop(0, [])
        for rank, chunks in parts.items():
            landings = [Box(torch.uint8, (chunk.nbytes,), (1,), chunk.offset) for chunk in chunks]
            self._flows[rank].expect(filled.fill, filled.slot, memory, landings)
        self._lacking[filled.fill] = set(parts)
        return ours

    def fill(self, fill: int) -> bool:
        """Take what has come. Returns whether all that they were to give for this fill is there.

        Raises:
            PeerLost: one of them is gone, and the sender did not say so.
            ProtocolError: one gave something else.
        """
        for rank, flow in self._flows.items():
            for number, _ in flow.fill():
                self._lacking[number].discard(rank)
        for flow in (self._flows[rank] for rank in self._lacking.get(fill, ())):
            if flow.lost and time.monotonic() - flow.since > _GRACE:
                raise PeerLost(f"{flow.origin.name}: {flow.lost}")
        if self._lacking.get(fill):
            return False
        self._lacking.pop(fill, None)
        return True

    def drop(self) -> None:
        """Nothing is expected any more."""
        self._lacking.clear()
        for flow in self._flows.values():
            flow.drop()

    def close(self) -> None:
        """Let go. May be called twice."""
        self._lacking.clear()
        for flow in self._flows.values():
            flow.close()
        self._flows.clear()
