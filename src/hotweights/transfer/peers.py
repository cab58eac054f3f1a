"""Peers: the receivers that are connected to one sender, which greets and counts them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..errors import Closed, PeerLost, ProtocolError, TransferError, TransferTimeout
from .address import Listener, check_peer
from .channel import Channel, close_in_children
from .messages import Hello, Wanted, Welcome
from .slots import WriteSlots
from .states import SessionState, Side
from .waits import Waker, left


@dataclass(eq=False)
class Peer:
    """One receiver, as the sender knows it. The running ``Outbound`` changes all but the first two attributes.

    Attributes:
        channel: its connection.
        name: for people: ``process 4711``.
        wanted: what it wants of the running update.
        holds: slots that it has not released.
        problem: what it said was wrong when it was done.
    """

    channel: Channel
    name: str
    wanted: tuple[Wanted, ...] = ()
    holds: set[int] = field(default_factory=set)
    problem: str = ""

    @property
    def state(self) -> SessionState:
        """The state of its connection."""
        return self.channel.session.state


class PeerGroup:
    """Everybody who connected. One thread uses it; any may ``stop`` it. Owns its sockets; close it."""

    def __init__(self, path: str, slots: WriteSlots, timeout: float) -> None:
        self.peers: list[Peer] = []
        self._slots = slots
        self._timeout = timeout
        self._waker = Waker()
        self._stopped = False
        try:
            self._listener = Listener(path)
        except BaseException:
            self._waker.close()
            raise
        close_in_children(self._listener)

    def gather(self, count: int) -> list[Peer]:
        """Wait until at least ``count`` receivers are there; returns all of them.

        Raises:
            TransferTimeout: they did not come in time; ``problems`` says why those left that came.
            Closed: ``stop`` was called.
        """
        deadline = time.monotonic() + self._timeout
        gone: list[str] = []
        while True:
            self._accept()
            for peer in list(self.peers):
                self._greet(peer, gone)
            ready = [peer for peer in self.peers if peer.state is SessionState.IDLE]
            if len(ready) >= count:
                return ready
            if not left(deadline):
                raise TransferTimeout(
                    f"{len(ready)} of {count} receivers were there after {self._timeout:g} s", gone[-20:]
                )
            self.wait(self.peers, left(deadline), listen=True)

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
        if self._stopped:
            raise Closed("the sender was closed")
        heard = [peer for peer in listed if peer.channel.socket.fileno() in ready]
        for peer in heard:
            peer.channel.flush()
        return heard

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

    def _accept(self) -> None:
        while (accepted := self._listener.accept()) is not None:
            try:
                name = f"process {check_peer(accepted)}"
            except ProtocolError as error:
                Channel(accepted, Side.SENDER).say_goodbye(str(error))
                continue
            names = {peer.name for peer in self.peers}
            number = 2
            while (unique := name if name not in names else f"{name} #{number}") in names:
                number += 1
            self.peers.append(Peer(Channel(accepted, Side.SENDER), unique))

    def _greet(self, peer: Peer, gone: list[str]) -> None:
        """Answer a hello, the only message that may come between updates. Who is gone is noted."""
        try:
            while (frame := peer.channel.read()) is not None:
                assert isinstance(frame.message, Hello), "the table lets nothing else pass"
                welcome = Welcome(len(self._slots.memories), self._slots.slot_nbytes, self._timeout)
                peer.channel.send(welcome, descriptors=(self._slots.descriptor,))
        except (PeerLost, ProtocolError) as error:
            gone.append(f"{peer.name}: {error}")
            self.part_with(peer, str(error))


def told(error: BaseException) -> str:
    """What the other side is told of an error."""
    return str(error) if isinstance(error, TransferError) else f"{type(error).__name__}: {error}"
