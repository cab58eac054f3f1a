"""Connection: a receiver's connection to whoever sends at an address, made again when it is lost."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from ..errors import Closed, PeerLost, ProtocolError, TransferError, TransferTimeout
from .address import check_peer, connect
from .channel import Channel
from .messages import Abort, Done, Frame, Hello, Message, Offer, Welcome
from .slots import ReadSlots
from .states import Session, Side
from .waits import Waker, left

_RETRY = 0.02  # seconds after which an address is tried again at which nobody listened; nothing tells when one does


class Connection:
    """One connection at a time. One thread uses it; any may ``stop`` it. Close it.

    Attributes:
        patience: seconds that the sender waits for a single answer.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._waker = Waker()
        self._channel: Channel | None = None
        self._slots: ReadSlots | None = None
        self._stopped = False
        self._using = threading.RLock()
        self.patience = 0.0

    @property
    def session(self) -> Session:
        """The running connection's."""
        if self._channel is None:
            raise PeerLost("the connection to the sender is gone")
        return self._channel.session

    @property
    def connected(self) -> bool:
        """Whether there is a connection. Its other end may be dead."""
        return self._channel is not None

    @property
    def slots(self) -> ReadSlots:
        """What the sender writes into."""
        slots = self._slots
        if slots is None:  # Another thread closed the receiver between two tensors.
            self.check_open()
            raise PeerLost("the connection to the sender is gone")
        return slots

    def offer(self, seconds: float) -> Frame:
        """Wait for the next offer, connecting as often as it takes. Its descriptor is the caller's.

        Raises:
            TransferTimeout: none came in time.
            ProtocolError: the sender speaks another protocol, or belongs to another user.
            TransferError: nobody can connect there, or the slots cannot be mapped.
            Closed: ``stop`` was called.
        """
        deadline = time.monotonic() + seconds
        last = "nobody listens there"
        with self._using:
            while left(deadline):
                try:
                    if self._connect():
                        frame = self.receive(deadline)
                        if (found := self._accepted(frame)) is not None:
                            return found
                        continue
                except PeerLost as error:
                    last = str(error)
                except TransferTimeout:
                    last = "the sender offered nothing"
                    break
                self.pause(min(_RETRY, left(deadline)))
        raise TransferTimeout(f"no offer came to {self._path} within {seconds:g} s", [last])

    def receive(
        self, deadline: float, *, stop: Callable[[], bool] = bool, meanwhile: Callable[[], float] = float
    ) -> Frame:
        """The next frame.

        Args:
            deadline: on the monotonic clock.
            stop: says true when somebody wants the wait to end, and calls ``wake`` then.
            meanwhile: is called before each wait, and says in how many seconds again; never, if none.

        Raises:
            TransferTimeout: none came in time.
            PeerLost: the sender is gone. So is the connection.
            ProtocolError: as ``PeerLost``; the sender broke the protocol.
            Closed: the wait was ended.
        """
        with self._using:
            while True:
                self.check_open(stop)
                channel = self._channel
                if channel is None:
                    raise PeerLost("the connection to the sender is gone")
                try:
                    frame = channel.read()
                except (PeerLost, ProtocolError):
                    self.drop()
                    raise
                if frame is not None:
                    return frame
                again = meanwhile()
                if not left(deadline):
                    raise TransferTimeout("the sender said nothing in time")
                seconds = min(left(deadline), again) if again else left(deadline)
                self._waker.wait([(channel.socket, channel.unsent)], seconds, lambda: self._stopped or stop())
                channel.flush()

    def send(self, message: Message) -> None:
        """Say something, of the running update. Nothing happens if the connection is gone: receiving says so."""
        with self._using:
            if self._channel is not None:
                self._channel.send(message)

    def drop(self, reason: str = "") -> None:
        """End the connection; the next offer makes a new one."""
        channel, self._channel = self._channel, None
        slots, self._slots = self._slots, None
        if channel is not None:
            channel.say_goodbye(reason) if reason else channel.close()
        if slots is not None:
            slots.close()

    def pause(self, seconds: float) -> None:
        """Wait for something that nothing tells of.

        Raises:
            Closed: ``stop`` was called.
        """
        self._waker.wait((), seconds, lambda: self._stopped)
        self.check_open()

    def wake(self) -> None:
        """Have the running wait ask its ``stop`` again."""
        self._waker.wake()

    def stop(self) -> None:
        """End every wait for good, from any thread."""
        self._stopped = True
        self._waker.wake()

    def close(self) -> None:
        """Let go of everything, when whoever waits has left. May be called twice."""
        self.stop()
        with self._using:
            self.drop("the receiver was closed")
            self._waker.close()

    def check_open(self, stop: Callable[[], bool] = bool) -> None:
        """Whether waits are to go on.

        Raises:
            Closed: they are not.
        """
        if self._stopped:
            raise Closed("this receiver was closed")
        if stop():
            raise Closed("this stream of leases was closed")

    def _connect(self) -> bool:
        if self._channel is not None:
            return True
        found = connect(self._path)
        if found is None:
            return False
        try:
            check_peer(found)
        except BaseException:
            found.close()
            raise
        self._channel = Channel(found, Side.RECEIVER)
        self._channel.send(Hello(os.getpid()))
        return True

    def _accepted(self, frame: Frame) -> Frame | None:
        """An offer that still stands; ``None`` for all that comes before one."""
        if isinstance(frame.message, Welcome):
            self._map(frame.message, frame.descriptors[0])
            return None
        return self._standing(frame) if isinstance(frame.message, Offer) else None

    def _standing(self, offer: Frame) -> Frame | None:
        """The offer, unless it was withdrawn before anybody looked."""
        assert self._channel is not None
        try:
            later = self._channel.read()
        except (PeerLost, ProtocolError):
            os.close(offer.descriptors[0])
            self.drop()
            raise
        if later is None:
            return offer
        assert isinstance(later.message, Abort), "the table lets nothing else pass"
        os.close(offer.descriptors[0])
        self.send(Done(""))
        return None

    def _map(self, welcome: Welcome, descriptor: int) -> None:
        self.patience = welcome.timeout
        try:
            self._slots = ReadSlots(descriptor, welcome.slots, welcome.slot_nbytes)
        except TransferError as error:
            self.drop(str(error))
            raise
        finally:
            os.close(descriptor)
