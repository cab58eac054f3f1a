"""Peers: the receivers that are connected to one sender, which greets and counts them."""

from __future__ import annotations

import itertools
import os
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import torch

from .. import signals
from ..errors import Closed, PeerLost, ProtocolError, TransferAborted, TransferError, TransferTimeout
from ..text import some
from .carriers.table import DEFAULT
from .channel import Channel, close_in_children
from .door import BACKLOG, PATIENCE, SILENT, Door, Endpoint
from .flow import Outflow, Waitable
from .messages import NAME, Account, Chunk, Crew, Filled, Hello, Past, Wanted, Welcome
from .roll import PLACES
from .shared_memory import WriteSlots
from .states import SessionState
from .waits import Waker, left

_AT_ONCE = 16  # connections that are taken between two looks at the clock
_LOOK = 1.0  # seconds between two looks at links to other hosts
_NOT_THERE = (
    "If they need longer to come, raise timeout= of the sender. If they came and gave up waiting, raise their "
    "offer_timeout=. Else their logs say what they refused."
)
_PLACED = re.compile(r"process \d+\)?( #\d+)? on ")
_SHOWN = 20  # of those that left while others were waited for


@dataclass(eq=False)
class Peer:
    """One receiver, as the sender knows it. The running ``Outbound`` changes all but the first six attributes.

    Attributes:
        channel: its connection.
        name: for people: ``process 4711``, or ``rank0 (process 4711)`` if the receiver has a name; ``process 4711 on
            gpu7`` if it is on another host.
        place: its own in the roll.
        flow: for bytes, where it does not read them in the sender's memory.
        door: through which it came.
        since: when it connected.
        size: how many workers it is: 1, or those behind a relay.
        relay: whether it is a relay.
        crew: their names, of a relay that takes part in the running update.
        wanted: what each of them wants of the running update.
        dropped: which of them it went on without before it voted, and why.
        fallen: which of them had not said that they have the version when the relay did, and why.
        holds: slots that it has not released.
        direct: bytes that ranks of a sharded trainer send it themselves.
        said: kinds of messages that came from it.
        moved: when it last said something of the running update.
        problem: what it said was wrong when it was done.
        accounts: what it has said of the last updates, and what it was not answered yet.
        epoch: of the lead that it had before.
        telling: whether it has yet to say that.
    """

    channel: Channel
    name: str
    place: int
    flow: Outflow | None = None
    door: Door | None = None
    since: float = field(default_factory=time.monotonic)
    size: int = 1
    relay: bool = False
    crew: tuple[str, ...] = ()
    wanted: tuple[tuple[Wanted, ...], ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    fallen: tuple[tuple[str, str], ...] = ()
    holds: set[int] = field(default_factory=set)
    direct: int = 0
    said: set[str] = field(default_factory=set)
    moved: float = 0.0
    problem: str = ""
    accounts: tuple[Account, ...] = ()
    epoch: int = 0
    telling: bool = False

    def begin(self) -> None:
        """Forget the version before."""
        self.wanted, self.crew, self.dropped, self.fallen = (), (), (), ()
        self.problem, self.moved, self.direct = "", 0.0, 0
        if self.flow is not None:
            self.flow.nbytes = 0
        self.holds.clear()
        self.said.clear()

    @property
    def state(self) -> SessionState:
        """The state of its connection."""
        return self.channel.session.state

    @property
    def ready(self) -> bool:
        """Whether a version can be offered to it."""
        attached = self.flow is None or self.flow.attached
        return self.state is SessionState.IDLE and self.size > 0 and attached and not self.telling

    @property
    def network_nbytes(self) -> int:
        """Bytes of the running update that went to it over the network."""
        return self.direct + (0 if self.flow is None else self.flow.nbytes)

    def recall(self, past: Past) -> None:
        """It told of the updates before."""
        self.accounts, self.epoch, self.telling = past.accounts, past.epoch, False

    @property
    def shown(self) -> str:
        """Its name; of a relay also how many workers it has, whose names come with their answers to an offer."""
        return f"{self.name} with {self.size} worker{'' if self.size == 1 else 's'}" if self.relay else self.name

    @property
    def names(self) -> tuple[str, ...]:
        """Of the workers that it is, as people read them."""
        return tuple(map(self.placed, self.crew)) or (self.name,)

    def placed(self, name: str) -> str:
        """The name that a relay said, with a host: the relay's, unless the worker stands behind yet another one."""
        return name if _PLACED.search(name) else f"{name} on {self.channel.host}"

    @property
    def waiting(self) -> tuple[Waitable, bool] | None:
        """What to wait for while bytes for it are unsent, and whether until it can be written to."""
        return None if self.flow is None else self.flow.waiting

    def hand_over(
        self, slot: int, memory: torch.Tensor, chunks: tuple[Chunk, ...], fill: int, origins: tuple[int, ...] = ()
    ) -> None:
        """Have it read what chunks say of a slot; it holds the slot until it has released it.

        ``origins``: which of them other ranks send, as in ``Filled``.
        """
        self.holds.add(slot)
        self.channel.send(Filled(slot, chunks, fill, origins))
        if self.flow is not None:
            own = [chunk for chunk, rank in zip(chunks, origins, strict=True) if not rank] if origins else chunks
            self.flow.put(memory, own)
            self.direct += sum(chunk.nbytes for chunk, rank in zip(chunks, origins, strict=False) if rank)

    def part(self, reason: str) -> None:
        """End its connections, and say why."""
        self.channel.say_goodbye(reason)
        if self.flow is not None:
            self.flow.close()


class Beside(Protocol):
    """Others that are heard while receivers are waited for: the ranks of a sharded trainer."""

    def sockets(self) -> list[tuple[socket.socket, bool]]:
        """What to wait for."""

    def looked(self) -> None:
        """Hear them. What this raises ends the wait."""


@signals.held_throughout
class PeerGroup:
    """Everybody who connected. One thread uses it; any may ``stop`` it. Owns its sockets; close it."""

    def __init__(
        self, endpoints: Sequence[Endpoint], slots: WriteSlots, timeout: float, carrier: str = DEFAULT
    ) -> None:
        """``carrier``: what brings bytes to receivers on other hosts."""
        self.peers: list[Peer] = []
        self._slots = slots
        self._timeout = timeout
        self._carrier = carrier
        self._waker = Waker()
        self._stopped = False
        self._gone: deque[str] = deque(maxlen=_SHOWN)  # why those left that came, until ``gather`` has told it
        self._died: list[str] = []  # between two updates, of those that were ready; until ``gather`` has told it
        self._doors: list[Door] = []
        try:
            for endpoint in endpoints:
                self._doors.append(endpoint.listen(carrier))
        except BaseException:
            self._waker.close()
            for door in self._doors:
                door.close()
            raise
        for door in self._doors:
            close_in_children(door)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where it listens."""
        return tuple(door.address for door in self._doors)

    def gather(
        self,
        count: int,
        *,
        drop: bool = False,
        meanwhile: Callable[[list[Peer]], object] = bool,
        beside: Beside | None = None,
    ) -> list[Peer]:
        """Wait until at least ``count`` receivers are there; returns all that are there, and all that wait to be taken.

        Args:
            count: how many.
            drop: wait for others where one has died since the last update. If not, the caller is told at once; the next
                call waits for another in its place.
            meanwhile: is called before each wait, with those that are there.
            beside: who is heard meanwhile.

        Raises:
            TransferAborted: one that was there has died, without a goodbye, and too few are left.
            TransferTimeout: they did not come in time; ``problems`` says why those left that came.
            Closed: ``stop`` was called.
        """
        deadline = time.monotonic() + self._timeout
        turns = 0
        while True:
            more, turns = self._meet(), turns + 1
            self.check_open()
            ready = self._ready()
            meanwhile(ready)
            # Whoever was waiting at the beginning has been taken after so many turns, even if others come without end.
            there = sum(peer.size for peer in ready)
            if there >= count and (not more or turns * _AT_ONCE > BACKLOG):
                self._died.clear()
                self._gone.clear()
                return ready
            if self._died and not more and not drop:
                died, self._died = self._died, []
                self._gone.clear()
                raise TransferAborted(
                    f"nothing was offered; {there} of {count} receivers are there. Send again to wait for another",
                    died,
                )
            if not left(deadline):
                who = [peer.shown for peer in self.peers if peer.ready or (peer.relay and not peer.size)]
                names = f"connected: {some(who)}" if who else f"nobody is connected to {', '.join(self.addresses)}"
                came = f"{there} of {count} receivers were there after {self._timeout:g} s"
                gone = tuple(self._gone)
                self._gone.clear()
                # Who came and was refused says why. Waiting longer does not help.
                longer = "" if gone else _NOT_THERE
                raise TransferTimeout(f"{came}; {names}", gone, advice=longer)
            self.listen(left(deadline), beside)

    @property
    def doors(self) -> Sequence[Door]:
        """Where it listens, for whoever else comes there."""
        return self._doors

    def admit(self) -> None:
        """Let in who waits. Nobody is greeted yet."""
        for door in self._doors:
            self._accept(door)

    def listen(self, seconds: float, beside: Beside | None = None) -> None:
        """Wait for a word of anybody, or until somebody connects."""
        if beside is None:
            self.wait(self.peers, seconds, listen=True)
        else:
            self.wait(self.peers, min(_LOOK, seconds), listen=True, also=beside.sockets())
            beside.looked()

    def connected(self) -> list[Peer]:
        """Everybody who is there now: some of those who wait are taken, the dead are forgotten. Never waits."""
        self.check_open()
        self._meet()
        return self._ready()

    def _ready(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.ready]

    def _meet(self) -> bool:
        """Take and greet those who wait. Returns whether others may wait."""
        waiting = [self._accept(door) for door in self._doors]
        for peer in list(self.peers):
            self._greet(peer)
        self._limit_silent()
        return any(waiting)

    def wait(
        self,
        peers: Iterable[Peer],
        seconds: float,
        *,
        listen: bool = False,
        also: Iterable[tuple[Waitable, bool]] = (),
    ) -> list[Peer]:
        """Wait until something comes from some of ``peers``, and return those. What is unsent goes out.

        Args:
            peers: who is waited for.
            seconds: how long at most.
            listen: whether the wait also ends when somebody connects.
            also: it ends, too, when one of these can be read from, or written to where it comes with ``True``.

        Raises:
            Closed: ``stop`` was called.
        """
        listed = list(peers)
        sockets = [*also, *((peer.channel.socket, peer.channel.unsent) for peer in listed)]
        flows = {peer: flow for peer in listed if (flow := peer.waiting) is not None}
        sockets += flows.values()
        sockets += [(waiting, False) for door in self._doors for waiting in door.sockets()] if listen else []
        if not all(peer.channel.shares for peer in listed):
            seconds = min(seconds, _LOOK)
        ready = self._waker.wait(sockets, seconds, lambda: self._stopped)
        self.check_open()
        flowing = {peer for peer, (flow, _) in flows.items() if flow.fileno() in ready}
        heard = [
            peer for peer in listed if peer.channel.socket.fileno() in ready or peer in flowing or peer.channel.is_due()
        ]
        for peer in heard:
            peer.channel.flush()
        return heard

    def check_open(self) -> None:
        """Check that waits are to go on.

        Raises:
            Closed: ``stop`` was called.
        """
        if self._stopped:
            raise Closed("the sender was closed")

    def part_with(self, peer: Peer, reason: str) -> None:
        """End the connection, and say why."""
        self.peers = [other for other in self.peers if other is not peer]
        peer.part(reason)

    def stop(self) -> None:
        """End every wait, now and later. Any thread may call it."""
        self._stopped = True
        self._waker.wake()

    def close(self) -> None:
        """Close every connection and stop listening. May be called twice."""
        for peer in self.peers:
            peer.part("the sender was closed")
        self.peers.clear()
        for door in self._doors:
            door.close()
        self._waker.close()

    def _accept(self, door: Door) -> bool:
        """Take some of those who wait, so that nobody can keep this busy for ever. Returns whether others may wait."""
        for _ in range(_AT_ONCE):
            try:
                guest = door.admit()
            except OSError as error:
                count = len(self.peers)
                raise TransferError(f"no receiver beyond the {count} connected can be taken: {error}") from error
            except ProtocolError as error:
                self._gone.append(str(error))
                continue
            if guest is None:
                return False
            try:
                place = self._place()
            except ProtocolError as error:
                self._gone.append(str(error))
                guest.channel.say_goodbye(str(error))
                continue
            self.peers.append(Peer(guest.channel, self._unique(guest.name), place, guest.flow, door))
        return True

    def _unique(self, name: str) -> str:
        names = {peer.name for peer in self.peers}
        numbered = (f"{name} #{number}" for number in itertools.count(2))
        return next(unique for unique in itertools.chain((name,), numbered) if unique not in names)

    def _place(self) -> int:
        """One that nobody has.

        Raises:
            ProtocolError: there is none.
        """
        taken = {peer.place for peer in self.peers}
        for place in range(PLACES):
            if place not in taken:
                return place
        raise ProtocolError(f"{PLACES} receivers are connected already, and a sender takes no more")

    def _limit_silent(self) -> None:
        """A receiver says hello as soon as it is connected: of those who do not, the last few may still be about to."""
        silent = [peer for peer in self.peers if peer.state is SessionState.CONNECTED]
        late = time.monotonic() - PATIENCE
        for peer in silent:
            if not peer.channel.shares and peer.since < late:
                self._send_away(peer, "it connected and did not say who it is")
        # Longer: whoever polls for versions now and then sees the welcome, and the token in it, at the next poll.
        late = time.monotonic() - max(PATIENCE, self._timeout)
        for peer in list(self.peers):
            idle = peer.state is SessionState.IDLE and peer.flow is not None and not peer.flow.attached
            if idle and peer.since < late:
                self._send_away(peer, "it never connected for its bytes")
        for peer in silent[: max(0, len(silent) - SILENT)]:
            if peer in self.peers:
                self._send_away(peer, "it connected and said nothing")

    def _send_away(self, peer: Peer, reason: str) -> None:
        self._gone.append(f"{peer.name}: {reason}")
        if peer.door is not None:
            peer.door.refused(f"{peer.name.partition(' #')[0]}: {reason}")
        self.part_with(peer, reason)

    def _greet(self, peer: Peer) -> None:
        """Answer a hello, the only message that may come between updates. Who is gone is noted."""
        try:
            while (frame := peer.channel.read()) is not None:
                if isinstance(frame.message, Crew):
                    peer.size, peer.relay = _counted(frame.message.count), True
                    continue
                if isinstance(frame.message, Past):
                    peer.recall(frame.message)
                    continue
                assert isinstance(frame.message, Hello), "the table lets nothing else pass"
                peer.size = _counted(frame.message.crew)
                peer.relay = peer.size != 1  # It begins without workers, and says how many it has.
                peer.telling = frame.message.past
                if not peer.channel.shares:
                    peer.name = self._unique(f"process {frame.message.pid} on {peer.channel.host}")
                if name := frame.message.name:
                    if len(name) > NAME or not name.isprintable():
                        raise ProtocolError(f"a receiver's name has at most {NAME} printable characters")
                    peer.name = self._unique(f"{name} ({peer.name})")
                welcome = Welcome(len(self._slots.memories), self._slots.slot_nbytes, self._timeout, peer.place)
                if peer.flow is not None:
                    more = {"token": peer.flow.token, "carrier": self._carrier, "pid": os.getpid()}
                    welcome = msgspec.structs.replace(welcome, **more)
                peer.channel.send(welcome, descriptors=(self._slots.descriptor,) if peer.channel.shares else ())
        except (PeerLost, ProtocolError) as error:
            if peer.state is SessionState.CONNECTED:
                self._send_away(peer, str(error))
                return
            self._gone.append(f"{peer.name}: {error}")
            if peer.state is SessionState.IDLE and isinstance(error, PeerLost) and not peer.channel.goodbye:
                self._died.append(self._gone[-1])
            self.part_with(peer, str(error))


def _counted(crew: int) -> int:
    if not 0 <= crew <= PLACES:
        raise ProtocolError(f"a relay has {PLACES} workers at most; this one said {crew}")
    return crew


def told(error: BaseException) -> str:
    """What the other side is told of an error."""
    if isinstance(error, TransferError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
