"""Inbound: the tensors of one version on their way into a receiver: asked for, leased, compared, acknowledged."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable

import torch

from .. import signals
from ..errors import PeerLost, ProtocolError, TransferError, TransferTimeout, UsageError
from ..manifest import TensorSpec
from ..memory.guards import Guard
from ..memory.host import ALIGNMENT
from ..memory.lease import Lease
from ..ranges import disjoint
from ..sources.contracts import Request
from ..text import some
from .arrival import Arrival
from .ballot import Ballot
from .connection import Connection
from .copying import copy_out, widen
from .member import Member, Standing
from .messages import Accept, Chunk, End, Filled, Frame, Offer, Wanted, specs_of, word_of
from .pending_leases import PendingLeases, PrivateMemory
from .registers.register import SharedRecord
from .registers.table import register_of
from .states import SessionState


class Inbound:
    """One version, from its offer on. Streamed once.

    Attributes:
        manifest: what is offered.
        member: what votes for the version or against it.
    """

    @signals.whole
    def __init__(self, connection: Connection, frame: Frame, private: PrivateMemory, timeout: float) -> None:
        """Takes over the frame's descriptor.

        Raises:
            ProtocolError: the offer is broken. The connection is ended.
        """
        offer = frame.message
        assert isinstance(offer, Offer)
        try:
            # On another host than the sender nobody can read the decision: it is heard, or not.
            ballot = Ballot(frame.descriptors[0]) if frame.descriptors else None
        except ProtocolError as error:
            connection.drop(str(error))
            raise
        try:
            self.manifest = specs_of(offer)
            record = SharedRecord(register_of(offer.register), frame.update, offer.place) if offer.register else None
            roll = connection.slots.roll
            standing = None if roll is None else Standing(roll, connection.place, frame.update)
        except BaseException as error:
            if ballot is not None:
                ballot.close()
            connection.drop(str(error))
            raise
        self._connection = connection
        self._pending = PendingLeases(connection, private, timeout)
        self.member = Member(
            connection,
            ballot,
            standing,
            self._pending,
            version=offer.version,
            timeout=timeout,
            record=record,
            update=offer.kept or frame.update,
            place=offer.place,
            is_elsewhere=offer.relayed or ballot is None or record is not None,
            is_kept=bool(offer.kept),
        )
        self._hashed = offer.digests
        self._copying = "copy and digest" if offer.digests else "copy"  # as the timeline has it
        self._specs = list(self.manifest.values())
        self._numbers = {name: number for number, name in enumerate(self.manifest)}
        self._requests = {number: Request(name) for name, number in self._numbers.items()}  # the best order first
        self._missing: set[int] = set()
        self._arriving: Arrival | None = None  # the tensor of which some bytes have come

    def want(self, requests: Iterable[str | Request]) -> None:
        """Only this, best in this order. Whoever says so decides too: the end of the stream is not its consent.

        Raises:
            UsageError: it comes too late, or asks for what is not offered.
        """
        if self.member.state is not SessionState.OFFERED:
            raise UsageError("this version is streaming already; say before that what is wanted")
        wanted = [Request(request) if isinstance(request, str) else request for request in requests]
        by_name = {request.name: request for request in wanted}
        if unknown := by_name.keys() - self._numbers.keys():
            raise UsageError(f"these are not offered: {some(sorted(unknown))}")
        if wrong := sorted(request.name for request in by_name.values() if not self._is_possible(request)):
            raise UsageError(f"of these, bytes are wanted that there are not, or some twice: {some(wrong)}")
        self._requests = {self._numbers[name]: request for name, request in by_name.items()}
        self.member.decides = True

    def _is_possible(self, request: Request) -> bool:
        if request.ranges is None:
            return True
        nbytes = self.manifest[request.name].nbytes
        inside = all(wanted.size and wanted.fits(nbytes) for wanted in request.ranges)
        return inside and bool(request.ranges) and disjoint(request.ranges)

    @signals.held
    def leases(self, guard: Guard) -> Generator[Lease, None, None]:
        """Every wanted tensor, as it comes; each lease ends when the next is asked for."""
        watcher = signals.watch()
        try:
            yield from self._leases(guard)
        finally:
            signals.unwatch(watcher)

    @signals.held
    def _leases(self, guard: Guard) -> Generator[Lease, None, None]:
        member = self.member
        member.require(SessionState.OFFERED, "was streamed before; the next offer brings the next")
        self._missing = set(self._requests)
        wanted = (
            Wanted(number, request.ranges or (), word_of(request.rounded)) for number, request in self._requests.items()
        )
        with member.timeline.event("ask"):
            self._connection.send(Accept(tuple(wanted)))
        try:
            while not isinstance(message := member.next_message(), End):
                assert isinstance(message, Filled), "the table lets nothing else pass"
                yield from self._slot(message, guard)
            member.electors = message.members
            self._pending.settle()
            self._check_complete()
        except (PeerLost, ProtocolError, TransferTimeout) as error:
            member.give_up(error)
            raise
        except Exception as error:
            member.fail(error)
            raise
        if not member.decides:
            with member.decision():
                pass  # To consume was to consent: there is nothing left to do.

    def _slot(self, filled: Filled, guard: Guard) -> Generator[Lease, None, None]:
        if not filled.chunks:
            raise ProtocolError("a slot came with nothing in it")
        in_slot: list[Lease] = []
        for chunk in filled.chunks:
            is_last = chunk is filled.chunks[-1]
            began = time.perf_counter()
            lease, lies_in_slot = self._lease(filled.slot, chunk, guard)
            if not lies_in_slot:
                self.member.timeline.note(self._copying, self._specs[chunk.tensor].name, began)
            if is_last and not lies_in_slot:  # Before its tensor is used: the bytes are copied, the sender may go on.
                self._return(filled, in_slot)
            if lease is None:
                continue
            yield lease
            lease.release()
            if not lies_in_slot:
                self._pending.free_private()
                continue
            in_slot.append(lease)
            if is_last:
                self._return(filled, in_slot)

    def _return(self, filled: Filled, in_slot: list[Lease]) -> None:
        with self.member.timeline.event("give back slots"):
            self._pending.return_slot(filled.slot, filled.fill, in_slot)

    def _lease(self, slot: int, chunk: Chunk, guard: Guard) -> tuple[Lease | None, bool]:
        """The tensor that a chunk completes, if it does; and whether it lies in the slot."""
        arrival = self._arrival(chunk)
        arrival.take(chunk.range)
        raw = self._raw(slot, chunk, arrival.spec)
        if arrival.complete:
            self._missing.discard(chunk.tensor)
            self._arriving = None
        if arrival.memory is None:
            self._place(arrival, guard)
        lies_whole = arrival.is_all(chunk.range) and not chunk.rounded
        if arrival.memory is None and not self._hashed and guard == "off" and lies_whole:
            return Lease(arrival.spec, raw=raw), True
        if arrival.memory is None:
            arrival.memory = self._pending.private(arrival.spec.nbytes)
        self._copy(raw, chunk, arrival)
        if not arrival.complete:
            return None, False
        if arrival.placed:
            return Lease(arrival.spec, raw=arrival.memory, tensor=arrival.memory, placed=True), False
        lease = Lease(arrival.spec, raw=arrival.memory, guard=guard)
        self._pending.lend_private(lease)
        return lease, False

    def _arrival(self, chunk: Chunk) -> Arrival:
        """The tensor that is arriving, if the chunk is of it, or else a new one."""
        arriving = self._arriving
        if arriving is not None and arriving.number != chunk.tensor:
            raise ProtocolError(f"{arriving.spec.name}: the rest of it was to come next, not {self._name(chunk)}")
        if chunk.tensor not in self._missing:
            raise ProtocolError(f"{self._name(chunk)} came, and was not asked for, or had come before")
        self._check_rounded(chunk)
        if (chunk.digest is None) is self._hashed:
            raise ProtocolError(f"{self._name(chunk)}: a digest came that was not promised, or none came")
        if arriving is None:
            ranges = self._requests[chunk.tensor].ranges or ()
            arriving = self._arriving = Arrival(chunk.tensor, self._specs[chunk.tensor], ranges)
        return arriving

    def _check_rounded(self, chunk: Chunk) -> None:
        if not chunk.rounded and chunk.shrunk == 1:
            return
        asked, spec, part = self._requests[chunk.tensor].rounded, self._specs[chunk.tensor], chunk.range
        if asked is not None and isinstance(spec.dtype, torch.dtype) and chunk.rounded == word_of(asked):
            item = spec.dtype.itemsize
            whole = not any(number % item for number in (part.start, part.nbytes, part.stride))
            if whole and chunk.shrunk * asked.itemsize == item:
                return
        raise ProtocolError(f"{spec.name} came as {chunk.rounded or 'less'}, which was not asked for")

    def _name(self, chunk: Chunk) -> str:
        offered = 0 <= chunk.tensor < len(self._specs)
        return self._specs[chunk.tensor].name if offered else f"tensor number {chunk.tensor}"

    def _raw(self, slot: int, chunk: Chunk, spec: TensorSpec) -> torch.Tensor:
        """The bytes of a chunk, if they lie in a slot."""
        memories = self._connection.slots.memories
        if not 0 <= slot < len(memories):
            raise ProtocolError(f"there is no slot {slot}, in which {spec.name} was to lie; there are {len(memories)}")
        memory, start, stop = memories[slot], chunk.offset, chunk.offset + chunk.nbytes
        if start < 0 or start % ALIGNMENT or stop > memory.numel():
            raise ProtocolError(
                f"{spec.name} does not lie in its slot: bytes {start} to {stop} of {memory.numel()}, "
                f"in which tensors begin at multiples of {ALIGNMENT}"
            )
        return memory[start:stop]

    def _place(self, arrival: Arrival, guard: Guard) -> None:
        """Have the bytes go straight to where the consumer wants them, if it says where."""
        into = self._requests[arrival.number].into
        room = None if into is None or guard != "off" else into()
        if room is not None:
            arrival.place(room)

    def _copy(self, raw: torch.Tensor, chunk: Chunk, arrival: Arrival) -> None:
        room = arrival.room(chunk.range)
        if chunk.rounded:
            rounded, wide = getattr(torch, chunk.rounded), arrival.spec.dtype
            assert isinstance(wide, torch.dtype)
            digest = widen(raw, rounded, room.view(wide), hashed=self._hashed)
        else:
            digest = copy_out(raw, room, hashed=self._hashed)
        if digest != chunk.digest:
            raise TransferError(
                "what was copied is not what the sender held; did somebody write to it",
                [f"{arrival.spec.name}: {chunk.digest:016x} was sent, {digest:016x} was copied"],
            )

    def _check_complete(self) -> None:
        if self._missing:
            missing = [f"{self._specs[number].name}: it never came" for number in self._missing]
            raise ProtocolError("the sender ended before everything was there", missing)
