"""Giving: a rank on another host than the one that leads sends receivers bytes of its slots, as it is told."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence
from typing import Any

import torch

from ... import signals
from ...errors import PeerLost, ProtocolError
from ..carriers.sockets import CARRIER
from ..channel import close_in_children
from ..flow import Waitable
from ..network import NetworkDoor
from ..slot_flow import SlotOutflow
from .words import Dismiss, Expect, Give

_OFTEN = 1.0  # seconds between two looks whether links are cut


@signals.held_throughout
class Giving:
    """The rank's door, and who came in. Owns sockets; close it."""

    def __init__(self, here: tuple[Any, ...]) -> None:
        """Listen at this address of the host, at any port.

        Raises:
            UsageError: nobody can.
        """
        host, family = str(here[0]), socket.AF_INET6 if len(here) > 2 else socket.AF_INET
        self._door = NetworkDoor(f"tcps://{host}:0", host, family, (host, 0, *here[2:]), None, CARRIER, host)
        close_in_children(self._door)
        self.port = int(self._door.sockets()[0].getsockname()[1])
        self._flows: dict[int, SlotOutflow] = {}  # by the receiver's place
        self._told: set[int] = set()  # of which the lead knows that they are here
        self._looked = time.monotonic()

    def do(self, word: Expect | Give | Dismiss, memories: Sequence[torch.Tensor]) -> None:
        """What the lead says."""
        match word:
            case Expect(_, tokens):
                self._expect(dict(tokens))
            case Give(_, slot, fill, to):
                for place, stretches in to:
                    if place in self._flows:  # Else the lead was told that it is lost.
                        self._flows[place].give(fill, slot, memories[slot], stretches)
            case Dismiss(_, place):
                self._part(place)

    def met(self) -> tuple[int, ...]:
        """Let in who waits; those of whom nobody was told yet."""
        with contextlib.suppress(OSError, ProtocolError):  # More files may be had later.
            while (guest := self._door.admit()) is not None:
                guest.channel.say_goodbye("a rank of a trainer listens here; its receivers connect to rank 0")
        new = tuple(place for place, flow in self._flows.items() if flow.attached and place not in self._told)
        self._told.update(new)
        return new

    def flush(self) -> list[tuple[int, str]]:
        """Send what the connections take. Those that are lost, and why: they are let go of."""
        lost = []
        looks = time.monotonic() - self._looked >= _OFTEN
        if looks:
            self._looked = time.monotonic()
        for place, flow in list(self._flows.items()):
            try:
                flow.flush()
                if looks:
                    flow.look()
            except PeerLost as error:
                lost.append((place, str(error)))
                self._part(place)
        return lost

    def sockets(self) -> list[tuple[Waitable, bool]]:
        """What to wait for."""
        doors: list[tuple[Waitable, bool]] = [(waiting, False) for waiting in self._door.sockets()]
        return [*doors, *(flow.waiting for flow in self._flows.values() if flow.waiting is not None)]

    def close(self) -> None:
        """Let go. May be called twice."""
        self._door.close()
        for place in list(self._flows):
            self._part(place)

    def _expect(self, tokens: dict[int, bytes]) -> None:
        for place in [place for place, flow in self._flows.items() if tokens.get(place) != flow.token]:
            self._part(place)
        for place in tokens.keys() - self._flows.keys():
            flow = self._flows[place] = SlotOutflow()
            flow.token = tokens[place]
            self._door.await_flow(flow)
        self._told.clear()

    def _part(self, place: int) -> None:
        if (flow := self._flows.pop(place, None)) is not None:
            flow.close()
