"""Connection: a receiver's connection to the sender at an address, made again when it is lost."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from .. import signals
from ..errors import Closed, PeerLost, ProtocolError, TransferError, TransferTimeout, UsageError
from ..notices import log
from .channel import Channel
from .decision import Decision
from .door import Endpoint
from .flow import Inflow, Waitable
from .messages import Abort, Account, Done, Filled, Frame, Hello, Message, Offer, Past, Verdict, Welcome
from .roll import PLACES
from .shared_memory import OwnSlots, ReadSlots
from .states import Session
from .waits import Waker, left

_NO_OFFER = (
    "the sender is there and offered nothing: it still trains, perhaps, or waits for other receivers; "
    "offer_timeout= waits longer"
)
QUIET = 10.0
"""Seconds after which it is logged that no sender is there."""

_LOOK = 1.0  # seconds between two looks at a link to another host
_SENDER = "the sender"


@signals.held_throughout
class Connection:
    """One connection at a time. One thread uses it; any may ``stop`` it. Close it.

    Attributes:
        patience: seconds that the sender waits for a single answer; 0 before it said so.
        place: of this receiver in the sender's roll.
        carrier: what brings bytes from the sender; empty where memory is shared.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        name: str = "",
        *,
        reconnect: bool = True,
        crew: int = 1,
        slots: Callable[[Inflow, int, int], OwnSlots] = OwnSlots,
    ) -> None:
        """``crew``: 0 for a relay. ``slots`` makes those for what comes from another host."""
        self._endpoint = endpoint
        self._reconnect = reconnect
        self._name = name
        self._crew = crew
        self._make_slots = slots
        self._waker = Waker()
        self._channel: Channel | None = None
        self._slots: ReadSlots | OwnSlots | None = None
        self._filling: deque[Frame] = deque()  # what was said of slots whose bytes are still on their way
        self._sender = _SENDER  # for people; with its process and host, where that is another one
        self._ahead: Frame | None = None  # what ``peek`` saw
        self._stopped = False
        self._account: Account | None = None  # what became of the last update here
        self._epoch = 0  # of the last lead
        self._last = ""  # what came instead of an offer, for the message when none comes in time
        self._using = threading.RLock()
        self.patience = 0.0
        self.place = 0
        self.carrier = ""

    @property
    def session(self) -> Session:
        """The running connection's session.

        Raises:
            PeerLost: there is none.
        """
        return self._running().session

    @property
    def connected(self) -> bool:
        """Whether there is a connection. Its other end may be dead."""
        return self._channel is not None

    @property
    def stopped(self) -> bool:
        """Whether ``stop`` was called."""
        return self._stopped

    @property
    def slots(self) -> ReadSlots | OwnSlots:
        """The memory that the sender writes into, or that what it sends is put into.

        Raises:
            PeerLost: the connection is gone.
            Closed: ``stop`` was called.
        """
        slots = self._slots
        if slots is None:  # Another thread closed the receiver between two tensors.
            self.check_open()
            raise PeerLost(f"the connection to {self._sender} is gone")
        return slots

    def offer(self, seconds: float) -> Frame:
        """Wait for the next offer, connecting as often as it takes. Its descriptor, if any, is the caller's.

        Raises:
            TransferTimeout: none came in time.
            PeerLost: there is no sender, and nobody waits for another one (``reconnect=False``).
            ProtocolError: the sender speaks another protocol, or belongs to another user.
            TransferError: nobody can connect there, or the slots cannot be mapped.
            Closed: ``stop`` was called.
        """
        deadline = time.monotonic() + seconds
        quiet = time.monotonic() + QUIET
        self._last = _NO_OFFER if self.connected else "nobody listens there"
        with self._using:
            while left(deadline):
                try:
                    if self._connect():
                        if (offer := self._accepted(self.receive(deadline))) is not None:
                            return offer
                        continue
                except PeerLost as error:
                    self._last = str(error)
                except TransferTimeout:
                    break
                if not self._reconnect:
                    raise PeerLost(f"no sender is at {self._endpoint.address}", [self._last])
                if not left(quiet):
                    quiet = deadline  # Once is enough.
                    log(logging.WARNING, "waiting for a sender at %s: %s", self._endpoint.address, self._last)
                self._waker.wait((), min(self._endpoint.retry, left(deadline)), lambda: self._stopped)
                self.check_open()
        raise TransferTimeout(f"no offer came to {self._endpoint.address} within {seconds:g} s", [self._last])

    def poll(self) -> Frame | None:
        """The next offer, if it is there. Never waits; its descriptor is the caller's.

        Raises:
            TransferError: as ``offer``, but for ``TransferTimeout``.
            Closed: ``stop`` was called.
        """
        with self._using:
            self.check_open()
            try:
                while self._connect():
                    channel = self._running()
                    channel.flush()
                    if (frame := self._read(channel)) is None:
                        return None
                    if (offer := self._accepted(frame)) is not None:
                        return offer
            except PeerLost:  # The next call connects to whoever is there then.
                self.drop()
            except ProtocolError as error:
                self.drop(str(error))
                raise
        return None

    def receive(
        self, deadline: float, *, stop: Callable[[], bool] = bool, meanwhile: Callable[[], float] = float
    ) -> Frame:
        """The next frame.

        Args:
            deadline: on the monotonic clock.
            stop: ends the wait when it says true. Whoever changes what it says calls ``wake`` then.
            meanwhile: is called before each wait. Returns the seconds after which to call it again; 0 for never.

        Raises:
            TransferTimeout: none came in time.
            PeerLost: the sender is gone. So is the connection.
            ProtocolError: as ``PeerLost``; the sender broke the protocol.
            Closed: the wait was ended.
        """
        with self._using:
            while True:
                self.check_open(stop)
                channel = self._running()
                try:
                    frame = self._read(channel)
                except (PeerLost, ProtocolError) as error:
                    self.drop(str(error))
                    raise
                if frame is not None:
                    return frame
                again = meanwhile()
                if not left(deadline):
                    raise TransferTimeout(f"{self._sender} said nothing in time")
                seconds = min(left(deadline), again or float("inf"), float("inf") if channel.shares else _LOOK)
                self._waker.wait(self._awaited(channel), seconds, lambda: self._stopped or stop())
                channel.flush()

    def note(self, account: Account) -> None:
        """What became of the last update here, for the next lead."""
        self._account = account

    def verdict(self, update: int, deadline: float, stop: Callable[[], bool] = bool) -> Decision | None:
        """What the next lead says about an update of which this process has noted that it is in doubt.

        Connects as often as it takes. Returns ``None`` if nobody came in time who knows it.

        Raises:
            Closed: the wait was ended.
        """
        with self._using:
            while left(deadline):
                self.check_open(stop)
                try:
                    if self._connect():
                        message = (frame := self.receive(deadline, stop=stop)).message
                        if isinstance(message, Welcome):
                            self._map(message, frame.descriptors)
                        elif isinstance(message, Verdict):
                            if message.about == update:
                                return message.decision
                        else:
                            _close(frame.descriptors)
                            self.drop("a version was offered to who is in doubt about the one before")
                            return None
                        continue
                except TransferError:  # Whoever comes next may know.
                    pass
                self._waker.wait((), min(self._endpoint.retry, left(deadline)), lambda: self._stopped or stop())
        return None

    def pause(self, seconds: float, stop: Callable[[], bool] = bool) -> None:
        """Wait for nothing but the end of the wait.

        Raises:
            Closed: the wait was ended.
        """
        self._waker.wait((), seconds, lambda: self._stopped or stop())
        self.check_open(stop)

    def greet(self) -> bool:
        """Connect, if there is no connection. Never waits. Returns whether the sender has said welcome.

        Raises:
            PeerLost, ProtocolError, TransferError: as ``step``; nobody can connect there.
        """
        if self._connect() and self._slots is None:
            self.step()
        return self._slots is not None

    def welcomed(self, seconds: float) -> bool:
        """Connect, and wait until the sender has said welcome. Returns whether it did in time.

        Raises:
            ProtocolError, TransferError: as ``offer``, but for ``PeerLost``.
            Closed: ``stop`` was called.
        """
        deadline = time.monotonic() + seconds
        with self._using:
            while True:
                self.check_open()
                try:
                    if self.greet() and (not isinstance(self._slots, OwnSlots) or self._slots.flow.greet()):
                        return True
                except PeerLost:  # Another may come there.
                    pass
                if not left(deadline):
                    return False
                self.rest(min(left(deadline), _LOOK if self.connected else self._endpoint.retry))

    def step(self) -> Frame | None:
        """The next frame but a welcome, if it is there. Never waits: ``awaited`` says what for.

        Raises:
            PeerLost, ProtocolError: the sender is gone, or broke the protocol. So is the connection.
            TransferError: there is no memory for the slots.
        """
        channel = self._running()
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            return ahead
        try:
            channel.flush()
            frame = self._read(channel)
        except (PeerLost, ProtocolError) as error:
            self.drop(str(error))
            raise
        if frame is not None and isinstance(frame.message, Welcome):
            self._map(frame.message, frame.descriptors)
            return None
        return frame

    def peek(self) -> bool:
        """Whether ``step`` has a frame now.

        Raises:
            TransferError: as ``step``.
        """
        self._ahead = self.step()
        return self._ahead is not None

    def rest(self, seconds: float = 0.0) -> None:
        """Wait until something may have come; or for so many seconds, by default until it is time to look again."""
        seconds = seconds or (_LOOK if self.connected else self._endpoint.retry)
        self._waker.wait(self.awaited(), seconds, lambda: self._stopped)
        self.check_open()

    def awaited(self) -> list[tuple[Waitable, bool]]:
        """The sockets to wait for, and whether until they can be written to."""
        return [] if self._channel is None else self._awaited(self._channel)

    def send(self, message: Message) -> None:
        """Say something, of the running update. Nothing happens if the connection is gone: receiving says so."""
        with self._using:
            if self._channel is not None:
                self._channel.send(message)

    def drop(self, reason: str = "") -> None:
        """End the connection; the next offer makes a new one."""
        with self._using:
            channel, self._channel = self._channel, None
            slots, self._slots = self._slots, None
            self._filling.clear()
            self._ahead = None
            if channel is not None:
                channel.say_goodbye(reason) if reason else channel.close()
            if slots is not None:
                slots.close()

    def wake(self) -> None:
        """Have the running wait ask its ``stop`` again."""
        self._waker.wake()

    def stop(self) -> None:
        """End every wait, now and later. Any thread may call it."""
        self._stopped = True
        self._waker.wake()

    def close(self) -> None:
        """Stop, wait until no thread uses it, and let go of everything. May be called twice."""
        self.stop()
        with self._using:
            self.drop("the receiver was closed")
            self._waker.close()

    def check_open(self, stop: Callable[[], bool] = bool) -> None:
        """Check that waits are to go on.

        Raises:
            Closed: the receiver was closed, or ``stop`` says true.
        """
        if self._stopped:
            raise Closed("this receiver was closed")
        if stop():
            raise Closed("this stream of leases was closed")

    def _running(self) -> Channel:
        channel = self._channel  # Read once: another thread may close the receiver between two looks.
        if channel is None:
            raise PeerLost(f"the connection to {self._sender} is gone")
        return channel

    def _connect(self) -> bool:
        if self._channel is not None:
            return True
        channel = self._endpoint.connect()
        if channel is None:
            return False
        self._channel, self._sender = channel, _SENDER
        channel.send(Hello(os.getpid(), self._name, self._crew, bool(self._account or self._epoch)))
        self._last = _NO_OFFER
        return True

    @signals.whole  # That a slot is being filled is known by the frame that said so: it must not be lost.
    def _read(self, channel: Channel) -> Frame | None:
        """The next frame, if it is there; one that says what a slot holds, when the slot holds it."""
        slots = self._slots
        if not isinstance(slots, OwnSlots):
            try:
                return channel.read()
            except UsageError:  # Nobody can ever be there. The next try begins anew.
                self.drop()
                raise
        if not self._filling:
            frame = channel.read()
            if frame is not None and isinstance(frame.message, Offer):
                slots.origins.meet(frame.message.origins)
            if frame is None or not isinstance(frame.message, Filled):
                slots.greet()
                return frame
            slots.expect(frame.message)
            self._filling.append(frame)
        first = self._filling[0].message
        assert isinstance(first, Filled)
        try:
            self._look_ahead(channel, slots)
            if not slots.fill(first.fill, len(self._filling) - 1):
                channel.look()
                return self._aborted(channel, slots) if slots.origins.lacking and channel.brings(Abort) else None
        except PeerLost:
            while channel.read() is not None:  # The sender may have said why it hung up.
                continue
            raise
        return self._filling.popleft()

    def _look_ahead(self, channel: Channel, slots: OwnSlots) -> None:
        """Have the flow go on behind the first slot, as far as it does that by itself."""
        while len(self._filling) <= slots.flow.ahead:
            with contextlib.suppress(PeerLost):  # That is raised when all that came is used.
                channel.look()
            if not channel.brings(Filled, next_only=True):
                return
            frame = channel.read()
            assert frame is not None
            assert isinstance(frame.message, Filled)
            slots.expect(frame.message)
            self._filling.append(frame)

    def _aborted(self, channel: Channel, slots: OwnSlots) -> Frame | None:
        """The abort that came. The ranks that were to fill a slot may have died: it is waited for no more.

        What the sender itself has sent comes before all that it sends later, so it is still expected.
        """
        self._filling.clear()
        while (frame := channel.read()) is not None and not isinstance(frame.message, Abort):
            if isinstance(frame.message, Filled):
                slots.expect(frame.message)
        slots.give_up()
        return frame

    def _awaited(self, channel: Channel) -> list[tuple[Waitable, bool]]:
        """The sockets to wait for, and whether until they can be written to."""
        awaited: list[tuple[Waitable, bool]] = [(channel.socket, channel.unsent)]
        return [*awaited, *self._slots.awaited] if isinstance(self._slots, OwnSlots) else awaited

    def _accepted(self, frame: Frame) -> Frame | None:
        """The offer in a frame, if there is one and it still stands."""
        if isinstance(frame.message, Welcome):
            self._map(frame.message, frame.descriptors)
            return None
        if isinstance(frame.message, Offer):
            self._check_epoch(frame)
            return self._standing(frame)
        return None  # A verdict on what is in doubt no more.

    def _check_epoch(self, offer: Frame) -> None:
        assert isinstance(offer.message, Offer)
        if offer.message.epoch < self._epoch:
            _close(offer.descriptors)
            reason = (
                f"a sender of epoch {offer.message.epoch} offered something, and one of epoch {self._epoch} came after "
                "it; a sender that was replaced sends no more"
            )
            self.drop(reason)
            raise ProtocolError(reason)
        self._epoch = offer.message.epoch

    def _standing(self, offer: Frame) -> Frame | None:
        """The offer, unless the sender aborted it before anybody looked."""
        assert self._channel is not None
        try:
            later = self._channel.read()
        except (PeerLost, ProtocolError) as error:
            _close(offer.descriptors)
            self.drop(str(error))
            raise
        if later is None:
            return offer
        assert isinstance(later.message, Abort), "the table lets nothing else pass"
        _close(offer.descriptors)
        self.send(Done(""))
        self._last = f"the sender gave up what it offered: {later.message.reason}"
        return None

    def _map(self, welcome: Welcome, descriptors: Sequence[int]) -> None:
        self.patience, self.place, self.carrier = welcome.timeout, welcome.place, welcome.carrier
        try:
            if not 0 <= welcome.place < PLACES:
                raise ProtocolError(f"the place {welcome.place} was promised; a roll has {PLACES}")
            if descriptors:
                self._slots = ReadSlots(descriptors[0], welcome.slots, welcome.slot_nbytes)
            else:
                channel = self._running()
                channel.other = self._sender = f"{_SENDER} (process {welcome.pid} on {channel.host})"
                flow = self._endpoint.flow(welcome.token, welcome.carrier)
                self._slots = self._make_slots(flow, welcome.slots, welcome.slot_nbytes)
                self._slots.sender = self._sender
            if self._account or self._epoch:
                self.send(Past(self._epoch, () if self._account is None else (self._account,)))
        except (TransferError, UsageError) as error:
            self.drop(str(error))
            raise
        finally:
            _close(descriptors)


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
