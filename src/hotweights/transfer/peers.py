"""Peers: the receivers that are connected to one sender, which greets and counts them."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from .. import signals
from ..errors import Closed, PeerLost, ProtocolError, TransferAborted, TransferError, TransferTimeout
from .address import BACKLOG, Listener, check_peer
from .channel import Channel, close_in_children
from .messages import NAME, Hello, Wanted, Welcome
from .roll import PLACES
from .shared_memory import WriteSlots
from .states import SessionState, Side
from .waits import Waker, left

_AT_ONCE = 16  # connections that are taken between two looks at the clock
_SILENT = 64  # connections that may be open before they said hello
_SHOWN = 20  # of those that left while others were waited for


@dataclass(eq=False)
class Peer:
    """One receiver, as the sender knows it. The running ``Outbound`` changes all but the first three attributes.

    Attributes:
        channel: its connection.
        name: for people: ``process 4711``, or ``rank0 (process 4711)`` if the receiver has a name.
        place: its own in the roll.
        wanted: what it wants of the running update.
        holds: slots that it has not released.
        said: kinds of messages that came from it.
        moved: when it last said something of the running update.
        problem: what it said was wrong when it was done.
    """

    channel: Channel
    name: str
    place: int
    wanted: tuple[Wanted, ...] = ()
    holds: set[int] = field(default_factory=set)
    said: set[str] = field(default_factory=set)
    moved: float = 0.0
    problem: str = ""

    def begin(self) -> None:
        """Forget the version before."""
        self.wanted, self.problem, self.moved = (), "", 0.0
        self.holds.clear()
        self.said.clear()

    @property
    def state(self) -> SessionState:
        """The state of its connection."""
        return self.channel.session.state


@signals.held_throughout
class PeerGroup:
    """Everybody who connected. One thread uses it; any may ``stop`` it. Owns its sockets; close it."""

    def __init__(self, path: str, slots: WriteSlots, timeout: float) -> None:
        self.peers: list[Peer] = []
        self._slots = slots
        self._timeout = timeout
        self._waker = Waker()
        self._stopped = False
        self._died: list[str] = []  # between two updates, of those that were ready; until ``gather`` has told it
        try:
            self._listener = Listener(path)
        except BaseException:
            self._waker.close()
            raise
        close_in_children(self._listener)

    def gather(self, count: int, *, drop: bool = False) -> list[Peer]:
        """Wait until at least ``count`` receivers are there; returns all that are there, and all that wait to be taken.

        Args:
            count: how many.
            drop: wait for others where one has died since the last update. If not, the caller is told at once; the next
                call waits for another in its place.

        Raises:
            TransferAborted: one that was there has died, without a goodbye, and too few are left.
            TransferTimeout: they did not come in time; ``problems`` says why those left that came.
            Closed: ``stop`` was called.
        """
        deadline = time.monotonic() + self._timeout
        gone: deque[str] = deque(maxlen=_SHOWN)
        turns = 0
        while True:
            more, turns = self._meet(gone), turns + 1
            self.check_open()
            ready = self._ready()
            # Whoever was waiting at the beginning has been taken after so many turns, even if others come without end.
            if len(ready) >= count and (not more or turns * _AT_ONCE > BACKLOG):
                self._died.clear()
                return ready
            if self._died and not more and not drop:
                died, self._died = self._died, []
                raise TransferAborted(
                    f"nothing was offered; {len(ready)} of {count} receivers are there. Send again to wait for another",
                    died,
                )
            if not left(deadline):
                raise TransferTimeout(f"{len(ready)} of {count} receivers were there after {self._timeout:g} s", gone)
            self.wait(self.peers, left(deadline), listen=True)

    def connected(self) -> list[Peer]:
        """Everybody who is there now: some of those who wait are taken, the dead are forgotten. Never waits."""
        self.check_open()
        self._meet(deque(maxlen=_SHOWN))
        return self._ready()

    def _ready(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.state is SessionState.IDLE]

    def _meet(self, gone: deque[str]) -> bool:
        """Take and greet those who wait. Returns whether others may wait."""
        more = self._accept(gone)
        for peer in list(self.peers):
            self._greet(peer, gone)
        self._limit_silent(gone)
        return more

    def wait(self, peers: Iterable[Peer], seconds: float, *, listen: bool = False) -> list[Peer]:
        """Wait until something comes from some of ``peers``, and return those. What is unsent goes out.

        Args:
            peers: who is waited for.
            seconds: how long at most.
            listen: whether the wait also ends when somebody connects.

        Raises:
            Closed: ``stop`` was called.
        """
        listed = list(peers)
        sockets = [(peer.channel.socket, peer.channel.unsent) for peer in listed]
        sockets += [(self._listener.socket, False)] if listen else []
        ready = self._waker.wait(sockets, seconds, lambda: self._stopped)
        self.check_open()
        heard = [peer for peer in listed if peer.channel.socket.fileno() in ready]
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
        peer.channel.say_goodbye(reason)

    def stop(self) -> None:
        """End every wait, now and later. Any thread may call it."""
        self._stopped = True
        self._waker.wake()

    def close(self) -> None:
        """Close every connection and stop listening. May be called twice."""
        for peer in self.peers:
            peer.channel.say_goodbye("the sender was closed")
        self.peers.clear()
        self._listener.close()
        self._waker.close()

    def _accept(self, gone: deque[str]) -> bool:
        """Take some of those who wait, so that nobody can keep this busy for ever. Returns whether others may wait."""
        for _ in range(_AT_ONCE):
            try:
                accepted = self._listener.accept()
            except OSError as error:
                count = len(self.peers)
                raise TransferError(f"no receiver beyond the {count} connected can be taken: {error}") from error
            if accepted is None:
                return False
            channel = Channel(accepted, Side.SENDER)
            try:
                name = f"process {check_peer(accepted)}"
                self.peers.append(Peer(channel, self._unique(name), self._place()))
            except ProtocolError as error:
                gone.append(str(error))
                channel.say_goodbye(str(error))
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

    def _limit_silent(self, gone: deque[str]) -> None:
        """A receiver says hello as soon as it is connected: of those who do not, the last few may still be about to."""
        silent = [peer for peer in self.peers if peer.state is SessionState.CONNECTED]
        for peer in silent[: max(0, len(silent) - _SILENT)]:
            gone.append(f"{peer.name}: it connected and said nothing")
            self.part_with(peer, "you said nothing, and others came")

    def _greet(self, peer: Peer, gone: deque[str]) -> None:
        """Answer a hello, the only message that may come between updates. Who is gone is noted."""
        try:
            while (frame := peer.channel.read()) is not None:
                assert isinstance(frame.message, Hello), "the table lets nothing else pass"
                if name := frame.message.name:
                    if len(name) > NAME or not name.isprintable():
                        raise ProtocolError(f"a receiver's name has at most {NAME} printable characters")
                    peer.name = self._unique(f"{name} ({peer.name})")
                welcome = Welcome(len(self._slots.memories), self._slots.slot_nbytes, self._timeout, peer.place)
                peer.channel.send(welcome, descriptors=(self._slots.descriptor,))
        except (PeerLost, ProtocolError) as error:
            gone.append(f"{peer.name}: {error}")
            if peer.state is SessionState.IDLE and isinstance(error, PeerLost) and not peer.channel.goodbye:
                self._died.append(gone[-1])
            self.part_with(peer, str(error))


def told(error: BaseException) -> str:
    """What the other side is told of an error."""
    return str(error) if isinstance(error, TransferError) else f"{type(error).__name__}: {error}"
