"""Inbound: one version on its way into a receiver. It leases, acknowledges, compares and waits for the decision."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager

import torch

from ..errors import (
    Closed,
    CommitHookError,
    PeerLost,
    ProtocolError,
    TransferAborted,
    TransferError,
    TransferTimeout,
    UsageError,
)
from ..manifest import TensorSpec
from ..memory.guards import Guard, poison_byte
from ..memory.host import ALIGNMENT
from ..memory.lease import Lease
from ..ranges import disjoint
from ..signals import Interruption, held_back
from ..sources.contracts import Request
from .arrival import Arrival, Private
from .ballot import Ballot, Decision
from .connection import Connection
from .copying import copy_out
from .messages import (
    Abort,
    Accept,
    Commit,
    Done,
    End,
    Filled,
    Frame,
    Message,
    Offer,
    Part,
    Prepared,
    Refuse,
    Release,
    Wanted,
    reasons_of,
    specs_of,
)
from .states import State
from .waits import holding, left

_POLL = 0.001  # seconds; device events have no wait with a deadline, so they are asked again this often


class Inbound:
    """One update, from its offer on. Owns the ballot until it is over.

    Attributes:
        manifest: what is offered.
        version: its name.
        cancelled: set by whoever wants the stream's wait to end.
    """

    def __init__(self, uplink: Connection, frame: Frame, private: Private, timeout: float) -> None:
        assert isinstance(frame.message, Offer)
        offer = frame.message
        self._ballot = Ballot(frame.descriptors[0])
        self._uplink = uplink
        self._private = private
        self._timeout = timeout
        self._hashing = offer.digests
        try:
            self.manifest = specs_of(offer)
        except ProtocolError as error:
            self._ballot.close()
            uplink.drop(str(error))
            raise
        self.version = offer.version
        self.cancelled = False
        self._specs = list(self.manifest.values())
        self._numbers = {name: number for number, name in enumerate(self.manifest)}
        self._wishes = {number: Request(name) for name, number in self._numbers.items()}  # in the order that suits best
        self._decides = False
        self._over = False
        self._arriving: Arrival | None = None
        self._missing: set[int] = set()
        self._kept: Lease | None = None  # the last one in private memory
        self._held: list[tuple[int, list[Lease]]] = []  # slots, and leases whose events may have yet to happen
        self._deciding = threading.RLock()  # held by whoever decides, refuses or commits
        self._interrupted: BaseException | None = None  # by what, after the group had decided to commit

    @property
    def over(self) -> bool:
        """Whether it was decided, or the sender lost."""
        return self._over

    @property
    def aborted(self) -> bool:
        """Whether the group gave it up, and the sender still waits to hear that it was put back."""
        return not self._over and self._uplink.connected and self.state in (State.ABORTED, State.REFUSED)

    @property
    def state(self) -> State:
        """Where the two sides stand."""
        return self._uplink.session.state

    def want(self, requests: Iterable[str | Request]) -> None:
        """Only this, best in this order. Whoever says so decides too: the end of the stream is not its consent."""
        if self.state is not State.OFFERED:
            raise UsageError("this version is streaming already; say before that what is wanted")
        found = {
            request.name: request for request in (Request(one) if isinstance(one, str) else one for one in requests)
        }
        if unknown := found.keys() - self._numbers.keys():
            raise UsageError(f"these are not offered: {', '.join(sorted(unknown))}")
        if odd := [request.name for request in found.values() if not self._can_be(request)]:
            raise UsageError(f"of these, bytes are wanted that there are not, or some twice: {', '.join(sorted(odd))}")
        self._wishes = {self._numbers[name]: request for name, request in found.items()}
        self._decides = True

    def _can_be(self, request: Request) -> bool:
        nbytes = self.manifest[request.name].nbytes
        if request.ranges is None:
            return True
        inside = all(one.size and one.fits(nbytes) for one in request.ranges)
        return inside and bool(request.ranges) and disjoint(request.ranges)

    # The stream.

    def leases(self, guard: Guard) -> Generator[Lease, None, None]:
        """Every wanted tensor, as it comes; each lease ends when the next is asked for."""
        self._require(State.OFFERED, "was streamed before; the next offer brings the next")
        self._missing = set(self._wishes)
        self._uplink.send(
            Accept(tuple(Wanted(number, request.ranges or ()) for number, request in self._wishes.items()))
        )
        try:
            while not isinstance(message := self._next(self._timeout, lambda: self.cancelled), End):
                assert isinstance(message, Filled), "the table lets nothing else pass"
                yield from self._slot(message, guard)
            self._settle()
            self._check()
        except (PeerLost, ProtocolError, TransferTimeout) as error:
            self._end_with(error)
            raise
        except Exception as error:
            self.fail(error)
            raise
        if not self._decides:
            with held_back(self._uplink.wake) as interruption, self.deciding():
                self.prepare(interruption)
                self.done(None)

    def _slot(self, filled: Filled, guard: Guard) -> Generator[Lease, None, None]:
        if not filled.parts:
            raise ProtocolError("a slot came with nothing in it")
        borrowed: list[Lease] = []  # those that lie in the slot
        for part in filled.parts:
            is_last = part is filled.parts[-1]
            lease = self._lease(filled.slot, part, guard)
            in_slot = lease is not None and lease is not self._kept and not lease.placed
            if is_last and not in_slot:  # Before its tensor is used: the bytes are copied, so the sender may go on.
                self._return(filled.slot, borrowed)
            if lease is None:
                continue
            yield lease
            lease.release()
            if not in_slot:
                self._vacate(wait=False)
                continue
            borrowed.append(lease)
            if is_last:
                self._return(filled.slot, borrowed)

    def _lease(self, slot: int, part: Part, guard: Guard) -> Lease | None:
        """The tensor that a part belongs to; ``None`` while some of it is still to come."""
        arrival = self._arrival(part)
        arrival.take(part.range)
        raw = self._raw(slot, part, arrival.spec)
        if arrival.complete:
            self._missing.discard(part.tensor)
            self._arriving = None
        if arrival.memory is None:
            self._place(arrival, guard)
        if arrival.memory is None and not self._hashing and guard == "off" and arrival.is_all(part.range):
            return Lease(arrival.spec, raw=raw)
        if arrival.memory is None:
            self._vacate(wait=True)
            arrival.memory = self._private.take(arrival.spec.nbytes)
        self._copy(raw, part, arrival)
        if not arrival.complete:
            return None
        if arrival.placed:
            return Lease(arrival.spec, raw=arrival.memory, tensor=arrival.memory, placed=True)
        self._kept = Lease(arrival.spec, raw=arrival.memory, guard=guard)
        return self._kept

    def _arrival(self, part: Part) -> Arrival:
        """The tensor that comes now, if the part is of it."""
        running = self._arriving
        if running is not None and running.number != part.tensor:
            raise ProtocolError(f"{running.spec.name}: the rest of it was to come next, not {part}")
        if part.tensor not in self._missing:
            raise ProtocolError(f"{part} was not asked for")
        if (part.digest is None) is self._hashing:
            raise ProtocolError(f"{part}: a digest came that was not promised, or none came")
        if running is None:
            spec = self._specs[part.tensor]
            running = self._arriving = Arrival(part.tensor, spec, self._wishes[part.tensor].ranges or ())
        return running

    def _raw(self, slot: int, part: Part, spec: TensorSpec) -> torch.Tensor:
        """The bytes of a part, if they lie in a slot."""
        memories = self._uplink.slots.memories
        if not 0 <= slot < len(memories):
            raise ProtocolError(f"there is no slot {slot}; {part} was to lie in it")
        stop = part.offset + part.range.size
        if part.offset < 0 or part.offset % ALIGNMENT or stop > memories[slot].numel():
            raise ProtocolError(f"{spec.name}: {part} does not lie in its slot")
        return memories[slot][part.offset : stop]

    def _place(self, arrival: Arrival, guard: Guard) -> None:
        """Have it go straight to where the consumer requests it, if it says where."""
        into = self._wishes[arrival.number].into
        room = None if into is None or guard != "off" else into()
        if room is not None:
            arrival.place(room)

    def _copy(self, raw: torch.Tensor, part: Part, arrival: Arrival) -> None:
        found = copy_out(raw, arrival.room(part.range), hashed=self._hashing)
        if found != part.digest:
            raise TransferError(
                "what was copied is not what the sender held; did somebody write to it",
                [f"{arrival.spec.name}: {part.digest:016x} was sent, {found:016x} was copied"],
            )

    def _return(self, slot: int, borrowed: list[Lease]) -> None:
        self._held.append((slot, borrowed))
        # Each release wakes the sender: half of the slots at once keep it busy as well, and wake it less often.
        if 2 * len(self._held) >= len(self._uplink.slots.memories):
            self._give_back()

    def _give_back(self) -> float:
        """Release the slots that nothing reads any more; says in how many seconds to look again, if at all."""
        still = [(slot, leases) for slot, leases in self._held if any(lease.pending() for lease in leases)]
        free = tuple(slot for slot, _ in self._held if all(slot != other for other, _ in still))
        if free and self._uplink.connected and self.state is State.STREAMING:
            self._uplink.send(Release(free))
        self._held = still
        return _POLL if still else 0.0

    def _vacate(self, *, wait: bool) -> None:
        """Private memory is free again when the device has read it."""
        lease = self._kept
        if lease is None:
            return
        if wait:
            self._until(lambda: not lease.pending())
        if not lease.pending():
            self._kept = None
            if lease.guard != "off":
                self._private.take(lease.spec.nbytes).fill_(poison_byte(lease.spec.dtype))

    def _settle(self) -> None:
        """Wait until no device reads what was leased."""
        self._vacate(wait=True)
        self._until(lambda: not self._give_back())

    def _until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._timeout
        while not happened():
            if not left(deadline):
                raise TransferTimeout(f"a device did not finish its copy within {self._timeout:g} s")
            self._uplink.pause(_POLL)

    def _check(self) -> None:
        if self._missing:
            names = ", ".join(sorted(self._specs[number].name for number in self._missing))
            raise ProtocolError(f"the sender ended, and these never came: {names}")

    # The decision.

    def deciding(self) -> AbstractContextManager[None]:
        """Inside, no other thread refuses or ends this; ``close`` may come at any time."""
        return holding(self._deciding, self._uplink.patience + self._timeout)

    def prepare(self, interruption: Interruption) -> None:
        """Say that a commit cannot fail from here on, and wait for the group's decision. Returns if it is to commit.

        Args:
            interruption: ends the wait, unless the decision has fallen already.

        Raises:
            TransferAborted: it is not; the message says why.
            TransferError: the sender is gone, and had not decided; so this is an abort for all.
        """
        self._require(State.ENDED, "has not streamed to its end")
        try:
            self._uplink.send(Prepared())
            self._hear(lambda: interruption.came or (self.cancelled and not self._decides))
        except TransferAborted:
            raise
        except BaseException as error:
            if self._ballot.decide(Decision.ABORT) is Decision.ABORT:
                self._end_with(TransferError("it was interrupted") if interruption.came else error)
                raise
            self._interrupted = None if isinstance(error, Exception) else error
            if not interruption.came or not self._hears_late():
                self._uplink.drop("it waited for the decision in vain, and read it")

    def _hear(self, stop: Callable[[], bool]) -> None:
        """The sender's word to commit. Until it says it, it may be waiting for others."""
        message = self._next(self._uplink.patience + self._timeout, stop)
        assert isinstance(message, Commit), "the table lets nothing else pass"

    def _hears_late(self) -> bool:
        """Whether the sender says what was read from the ballot, which it does unless it is lost."""
        try:
            self._hear(bool)
        except (TransferError, Closed):
            return False
        return True

    def done(self, error: BaseException | None) -> None:
        """Say that the commit was carried out, and what went wrong after it."""
        if self._over:
            return
        if error is not None and not isinstance(error, CommitHookError):
            self._uplink.drop(f"the version was to be taken, and was not: {' '.join(reasons_of(error))}")
        elif self._uplink.connected:
            self._uplink.send(Done("" if error is None else "; ".join(reasons_of(error))))
        self._finish()
        interrupted, self._interrupted = self._interrupted, None
        if interrupted is not None and error is None:
            raise interrupted

    def fail(self, error: BaseException) -> None:
        """Within the stream it failed. Whoever decides puts version N back now, and refuses when that is done."""
        if not self._decides:
            self.refuse(error)
        elif not self._over and self._uplink.connected:
            self._say_no(error)

    def refuse(self, error: BaseException) -> None:
        """Tell the sender why this version cannot be taken; whatever it wrote is put back. Nothing when it is over."""
        with self.deciding():
            if not self._over:
                self._refuse(error)

    def _refuse(self, error: BaseException) -> None:
        try:
            self._say_no(error)
            while self.state is not State.ABORTED:  # Slots may be under way still.
                self._uplink.receive(time.monotonic() + self._timeout, meanwhile=self._give_back)
            self._put_back()
        except BaseException as failure:
            self._end_with(failure)
            if not isinstance(failure, (TransferError, Closed)):
                raise

    def leave(self) -> None:
        """The consumer went away; if that was before the end, it refuses."""
        if not self._over and self._uplink.connected and self.state in (State.OFFERED, State.STREAMING):
            self.fail(TransferError("the consumer left before the last tensor"))

    def _say_no(self, error: BaseException) -> None:
        if self.state in (State.OFFERED, State.STREAMING, State.ENDED):
            self._uplink.send(Refuse(reasons_of(error)))

    def _put_back(self) -> None:
        """The abort is carried out, and the sender may use its slots again."""
        self._settle()
        self._uplink.send(Done(""))
        self._finish()

    def _next(self, seconds: float, stop: Callable[[], bool]) -> Message:
        """The sender's next word, unless it is an abort. ``stop`` ends the wait when it says true."""
        frame = self._uplink.receive(time.monotonic() + seconds, stop=stop, meanwhile=self._give_back)
        if isinstance(frame.message, Abort):
            if not self._decides:
                self._put_back()
            raise TransferAborted("the update was aborted", [frame.message.reason])
        return frame.message

    def _require(self, state: State, otherwise: str) -> None:
        self._uplink.check_open()
        if self._over or self.state is not state:
            raise UsageError(f"version {self.version!r} {'is over' if self._over else otherwise}")

    def _end_with(self, error: BaseException) -> None:
        self._uplink.drop("; ".join(reasons_of(error)))
        self._finish()

    def _finish(self) -> None:
        self._over = True
        self._held.clear()
        self._kept = None
        self._ballot.close()
