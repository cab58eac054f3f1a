"""Outbound: one version on its way from a sender to its receivers: offered, sent, decided for all of them at once."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
import torch

from .. import signals
from ..errors import PeerLost, ProtocolError, TransferAborted, TransferError, TransferIncomplete
from ..manifest import TensorSpec
from ..sources.contracts import InMemory, Source
from ..timeline import Timeline
from .ballot import Ballot
from .decision import Decision, Vote, of_lead
from .doubts import Decided
from .flow import Waitable
from .host_report import Pace
from .losses import Losses, dropped, fallen
from .messages import (
    REASON,
    SEAT_NAME,
    SEATS_NAMED,
    Abort,
    Accept,
    Chunk,
    Commit,
    Crew,
    Done,
    End,
    Frame,
    Offer,
    Past,
    Prepared,
    Refuse,
    Release,
    Seat,
    described,
    kind_of,
    listed,
)
from .packing import Packing, Piece, pieces
from .peers import Peer, PeerGroup, told
from .registers.register import DecisionRecord, Register
from .report import SendReport
from .shared_memory import WriteSlots
from .states import SessionState
from .waits import left
from .wishes import problem_of, unwanted, wishes_of

_OPEN = (SessionState.OFFERED, SessionState.STREAMING, SessionState.ENDED, SessionState.PREPARED, SessionState.REFUSED)


@signals.held_throughout
class Outbound:
    """One update of a group. ``run`` it once, and ``close`` it.

    Attributes:
        decided: what was decided, and about whom; ``None`` where that is not known here.
    """

    _is_relayed = False
    _role = "the sender"

    def __init__(
        self,
        group: PeerGroup,
        members: Sequence[Peer],
        slots: WriteSlots,
        *,
        update: int,
        timeout: float,
        digests: bool,
        drop: bool,
        needed: int = 0,
        register: Register | None = None,
        epoch: int = 0,
        advance: Callable[[int], None],
        timeline: Timeline,
    ) -> None:
        """``drop``: go on without members that are lost. ``advance`` is called with the bytes that were sent.

        ``needed``: how many receivers must be there, behind relays too, if nobody may be lost.
        ``register``: where the decision is written; without one it falls in this process.
        """
        self._group = group
        self._members = list(members)  # those that take part
        self._leaving: list[Peer] = []  # those that refused, and are yet to say that they put everything back
        self._slots = slots
        self._update = update
        self._timeout = timeout
        self._hashed = digests
        self._filling = "fill slots and digest" if digests else "fill slots"  # as the timeline has it
        self._packing = Packing(slots, hashed=digests)
        self._may_lose = drop
        self._needed = needed
        self._register = register
        self._epoch = epoch
        self.decided: Decided | None = None
        self._agreed = False  # Whether everybody is prepared: from here on the decision may be to commit.
        self._doubtful = False  # Whether others may take the version although this group does not.
        self._over = False  # Whether it is decided: whoever is lost after that changes nothing.
        self._advance = advance
        self._timeline = timeline
        self._began = time.monotonic()
        self._pace = Pace()
        self._waited: dict[str, float] = {}  # seconds by name
        self._losses = Losses()
        self._tensors = self._nbytes = 0
        self._unwanted: tuple[str, ...] = ()
        self._ballot = Ballot.new()  # The last: a signal in what comes after would leave its descriptor.

    def run(self, source: Source, version: str | int, check: Callable[[], object] = bool) -> SendReport:
        """Offer, send, decide. ``check`` is called when everything was read; if it raises, nobody takes the version.

        Raises:
            TransferAborted: nobody took the version.
            TransferIncomplete: the group took the version, and some members did not say that they have it.
            Exception: the source failed; nobody took the version.
        """
        register = "" if self._register is None else self._register.told
        return self._run(
            version,
            list(source.manifest.values()),
            lambda: Offer(
                version,
                self._hashed,
                described(source.manifest),
                register=register,
                epoch=self._epoch,
                drop=self._may_lose,
                patience=self._timeout,
            ),
            lambda: self._send(source, check),
        )

    def close(self) -> None:
        """Let go of the ballot, also where it never ran. May be called twice."""
        self._ballot.close()

    def _run(
        self,
        version: str | int,
        offered: Sequence[TensorSpec],
        offer: Callable[[], Offer],
        send: Callable[[], None],
    ) -> SendReport:
        """As ``run``."""
        for peer in self._members:
            peer.begin()
        try:
            try:
                with self._timeline.event("wait for answers to the offer"):
                    self._offer(offer(), offered)
                send()
                with self._timeline.event("wait until all are prepared"):
                    self._end()
                self._ask()
                self._agreed = of_lead(self._votes(), drop=self._may_lose) is Decision.COMMIT
                if self._decide(Decision.COMMIT) is Decision.ABORT:
                    raise self._outvoted()
            except BaseException as error:
                # Ctrl-C may come when the group has just decided to commit. Then the version is taken all the same.
                if self._decide(Decision.ABORT) is Decision.COMMIT:
                    self._commit(version)
                elif not self._over:
                    self._abort(error)
                raise
            return self._commit(version)
        finally:
            for peer in (*self._members, *self._leaving):  # Some are left only if the steps above were interrupted.
                if peer.state is not SessionState.IDLE:
                    self._group.part_with(peer, "the sender gave up waiting")

    # The steps.

    def _offer(self, offer: Offer, offered: Sequence[TensorSpec]) -> None:
        self._pace.begin("accept")
        counted = {peer: peer.size for peer in self._members}
        for peer in self._members:
            ballot = (self._ballot.descriptor,) if peer.channel.shares else ()
            peer.channel.send(self._own(offer, peer), update=self._update, descriptors=ballot)
        self._wait(self._in(SessionState.OFFERED), "answer the offer")
        for peer in list(self._members):
            if problem := next(filter(None, (problem_of(wish, offered) for wish in peer.wanted)), ""):
                self._lose(peer, problem)
        self._unwanted = unwanted(self._members, offered)
        there = sum(len(peer.names) for peer in self._members)
        if there < self._needed and not self._may_lose:
            # A relay may have told of a worker that left when the offer was on its way.
            fewer = [(peer, len(peer.names), size) for peer, size in counted.items() if len(peer.names) < size]
            raise TransferAborted(
                f"the update was aborted: {there} of {self._needed} receivers answered; send again to wait for others",
                [f"{peer.name}: {size - has} of its {size} workers left before" for peer, has, size in fewer],
            )

    def _own(self, offer: Offer, peer: Peer) -> Offer:
        """The offer to one receiver."""
        return msgspec.structs.replace(offer, place=peer.place)

    def _send(self, source: Source, check: Callable[[], object]) -> None:
        asking, requests, order = wishes_of(self._members)
        tensors = _tensors(source, order, self._group.check_open)
        for number, tensor in self._timeline.each("read", tensors):
            self._tensors += 1
            for piece in pieces(tensor, requests[number], self._slots.slot_nbytes):
                self._put(number, piece, asking)
        check()
        self._hand_over(asking)

    def _put(self, number: int, piece: Piece, asking: Sequence[Peer]) -> None:
        nbytes = piece.range.size
        if not self._packing.has_room(nbytes):
            self._hand_over(asking)
            self._packing.begin(self._free_slot())
        began = time.perf_counter()
        self._packing.put(number, piece)
        self._timeline.note(self._filling, "", began)
        self._nbytes += nbytes

    def _hand_over(self, asking: Sequence[Peer]) -> None:
        """Tell all who want something of the slot. It is not written again before the last of them has released it."""
        slot, packed, fill = self._packing.take()
        if slot is not None:
            self._tell(slot, packed, fill, asking)
            self._look()

    def _tell(
        self, slot: int, packed: Sequence[tuple[Chunk, frozenset[int]]], fill: int, asking: Sequence[Peer]
    ) -> None:
        began = time.perf_counter()
        self._pace.begin("release")
        places: dict[Peer, list[int]] = {}
        for place, peer in enumerate(asking):
            places.setdefault(peer, []).append(place)
        for peer, own in places.items():
            workers = set(own[: len(peer.names)])  # but for what it keeps itself
            chunks = tuple(chunk for chunk, wanting in packed if not wanting.isdisjoint(own))
            if chunks and peer in self._members:
                self._hand_to(peer, slot, chunks, fill)
                self._pace.shared(peer, sum(chunk.nbytes * len(workers & wanting) for chunk, wanting in packed))
        self._advance(sum(chunk.nbytes for chunk, _ in packed))
        self._timeline.note("hand over slots", "", began)

    def _hand_to(self, peer: Peer, slot: int, chunks: tuple[Chunk, ...], fill: int) -> None:
        peer.hand_over(slot, self._slots.memories[slot], chunks, fill)

    def _free_slot(self) -> int:
        with self._timeline.event("wait for a free slot"):
            self._wait(lambda: [] if self._free() else [peer for peer in self._members if peer.holds], "release a slot")
        return self._free()[0]

    def _free(self) -> list[int]:
        held = set().union(*(peer.holds for peer in self._members))
        return [slot for slot in range(len(self._slots.memories)) if slot not in held]

    def _end(self) -> None:
        self._pace.begin("prepared")
        electors = self._electors()
        for peer in self._members:  # Who shares the ballot is never in doubt.
            peer.channel.send(End(() if peer.channel.shares and not self._is_relayed else electors))
        self._wait(self._in(SessionState.ENDED, SessionState.STREAMING), "prepare")
        self._look()

    def _electors(self) -> tuple[Seat, ...]:
        """All who are to vote, for those that may be in doubt later."""
        named = [peer.name[:SEAT_NAME] for peer in self._members[:SEATS_NAMED]]
        names = itertools.chain(named, itertools.repeat(""))
        return tuple(Seat(peer.place, len(peer.names), name) for peer, name in zip(self._members, names, strict=False))

    def _ask(self) -> None:
        """Everybody is prepared. Whoever does not decide alone asks here; nothing can be aborted after it returns."""

    def _decide(self, vote: Decision) -> Decision:
        """What is decided about the members then. Before all are prepared it is to abort, whatever somebody wrote."""
        if self._agreed:
            # First: a member that finds the decision looks then whether it is about it.
            for peer in self._members:
                self._slots.roll.enlist(peer.place, self._update)
            if self._register is not None:
                # First of all: who has lost this process, or does so now, finds it there.
                places = tuple(peer.place for peer in self._members)
                vote = self._register.decide(self._update, DecisionRecord(vote, places)).decision
        decision = self._ballot.decide(vote)
        return decision if self._agreed else Decision.ABORT

    def _outvoted(self) -> TransferAborted:
        """Somebody else wrote the decision: a prepared member that then left, or one that was not to write it."""
        holders = [peer.name for peer in self._members]
        self._abort(TransferAborted("the update was aborted", ["a receiver wrote the decision"]))
        unasked = f"{' or '.join(holders)}: it wrote the decision without being asked"
        return TransferAborted("the update was aborted", self._losses.gave_up or [unasked])

    def _votes(self) -> list[Vote]:
        votes = [Vote.PREPARED if peer.state is SessionState.PREPARED else Vote.OPEN for peer in self._members]
        return votes + [Vote.LOST] * len(self._losses)

    def _commit(self, version: str | int) -> SendReport:
        self._over = True
        members = list(self._members)
        self._pace.begin("done")
        self.decided = Decided(Decision.COMMIT, frozenset(peer.place for peer in members))
        for peer in members:
            peer.channel.send(Commit())
        with self._timeline.event("wait for commits"):
            self._wait(self._in(SessionState.COMMITTED), "say that it has the version")
        self._part()
        late, left_out = fallen(self._members), dropped(self._members)
        has_it = (name for peer in self._members for name in peer.names)
        committed = tuple(name for name in has_it if name not in late and name not in left_out)
        silent = {peer.name: self._losses.reason(peer) for peer in members if peer not in self._members} | late
        if silent:
            raise TransferIncomplete(
                f"version {version!r} was taken, and not everybody said so; {', '.join(committed) or 'nobody'} did",
                [f"{name}: {why}" for name, why in silent.items()],
                committed=committed,
            )
        return SendReport(
            version=version,
            committed=committed,
            lost=self._losses.reported | left_out,
            problems={peer.name: peer.problem for peer in self._members if peer.problem},
            tensors=self._tensors,
            unwanted=self._unwanted,
            nbytes=self._nbytes,
            seconds=time.monotonic() - self._began,
            waited=dict(self._waited),
            events=tuple(self._timeline.events),
            network_nbytes=sum(peer.network_nbytes for peer in self._members),
            since_epoch=self._timeline.since_epoch,
            hosts=self._pace.reports(self._members, self._timeline.began),
        )

    def _abort(self, error: BaseException) -> None:
        self._over = True
        if not self._doubtful:
            self.decided = Decided(Decision.ABORT, frozenset())
        reason = told(error)
        if not isinstance(error, TransferError):  # It is of this process, and says nothing of where it ran.
            reason = f"{self._role} (process {os.getpid()} on {socket.gethostname()}): {reason}"
        for peer in list(self._members):
            if peer.state in _OPEN:
                peer.channel.send(Abort(reason[:REASON], self._doubtful))
        self._part()

    def _part(self) -> None:
        """Wait until those that abort have put everything back. Who does not answer is parted with."""
        peers = [*self._members, *self._leaving]
        self._wait(lambda: [peer for peer in peers if peer.state is SessionState.ABORTED and _is_open(peer)], "abort")

    # Waiting.

    def _in(self, *states: SessionState) -> Callable[[], list[Peer]]:
        return lambda: [peer for peer in self._members if peer.state in states]

    def _wait(self, pending: Callable[[], list[Peer]], deed: str) -> None:
        """Wait until nobody is pending any more. Who is at the deadline is lost, since it did not do the deed."""
        start = time.monotonic()
        while peers := pending():
            # Each has its own time: one that stands still must not use up that of those that go on.
            deadlines = {peer: max(start, peer.moved) + self._timeout for peer in peers}
            late = [peer for peer in peers if not left(deadlines[peer])]
            began = time.monotonic()
            self._look(left(min(deadlines.values())))
            for peer in peers:
                self._waited[peer.name] = self._waited.get(peer.name, 0.0) + time.monotonic() - began
            # After a look: it may have answered in time while this process stood still.
            for peer in late:
                if peer in pending() and not left(max(start, peer.moved) + self._timeout):
                    self._lose(peer, f"it did not {deed} within {self._timeout:g} s")

    def _look(self, seconds: float = 0.0) -> None:
        """Wait until something comes, for ``seconds`` at most, and take it."""
        peers = [peer for peer in (*self._members, *self._leaving) if peer.state is not SessionState.IDLE]
        for peer in self._group.wait(peers, seconds, also=self._also()):
            try:
                if peer.flow is not None:
                    peer.flow.flush()
                # A peer that is done is not read: what comes after that, a goodbye maybe, is not of this update.
                while _is_active(peer) and (frame := peer.channel.read()) is not None:
                    self._take(peer, frame)
            except (PeerLost, ProtocolError) as error:
                # Struck before it hears of it: a member that has lost its sender may vote, and would end it for all.
                self._strike(peer)
                peer.part(str(error))  # Also to who has refused: there is nothing to wait for.
                self._lose(peer, str(error))
        if not self._over and self._ballot.read() is not None:
            raise self._outvoted()
        self._looked()

    def _also(self) -> list[tuple[Waitable, bool]]:
        """What else to wait for."""
        return []

    def _looked(self) -> None:
        """It waited."""

    def _take(self, peer: Peer, frame: Frame) -> None:
        """What a receiver says. Nothing of it can be said without end: a slot is released once, the rest said once.

        Raises:
            ProtocolError: it was said before.
        """
        kind = kind_of(frame.message)
        if kind in peer.said and not isinstance(frame.message, (Release, Crew, Past)):
            raise ProtocolError(f"the receiver said {kind!r} twice")
        peer.said.add(kind)
        peer.moved = time.monotonic()
        self._pace.heard(peer, kind)
        match frame.message:
            case Accept(wanted, others, crew):
                peer.wanted, peer.crew = (wanted, *others), crew
                if len(crew) > len(peer.wanted):
                    raise ProtocolError(f"{len(crew)} workers were named, and {len(peer.wanted)} said what they want")
            case Release(slots):
                if not slots or len(set(slots)) < len(slots) or not peer.holds.issuperset(slots):
                    raise ProtocolError(
                        f"the receiver released the slots {list(slots)[:9]}; it held {sorted(peer.holds)}"
                    )
                peer.holds.difference_update(slots)
            case Prepared(lost):
                if lost and not self._may_lose:
                    raise ProtocolError(f"it went on without {lost[0][0]}, and nobody may be lost")
                peer.dropped = lost
            case Refuse(reasons) if peer.state is SessionState.REFUSED:
                self._lose(peer, listed(reasons))
            case Crew(count):
                peer.size = count
            case Past():
                peer.recall(frame.message)
            case Done(problem, lost):
                peer.problem, peer.fallen = problem, lost

    def _may_go(self, peer: Peer) -> bool:
        """Whether the others may go on without it."""
        return self._may_lose

    def _may_be_in_doubt(self, peer: Peer) -> bool:
        """Whether it votes, as far as is known here, and can read nowhere that the others went on without it."""
        voting = peer.state in (SessionState.ENDED, SessionState.PREPARED)
        return voting and not peer.channel.shares and self._register is None

    def _strike(self, peer: Peer) -> None:
        """Note in the roll that the peer is no member of this update. After the decision nothing is taken back."""
        if not self._over:
            self._slots.roll.strike(peer.place, self._update)

    def _lose(self, peer: Peer, reason: str) -> None:
        """Go on without a peer.

        Raises:
            TransferAborted: nobody may be lost, or nobody is left.
        """
        refused = peer.state is SessionState.REFUSED and _is_open(peer)
        self._members = [member for member in self._members if member is not peer]
        self._leaving = [member for member in self._leaving if member is not peer]
        self._strike(peer)  # Before a slot that it holds is filled again.
        peer.holds.clear()
        self._losses.add(peer, reason, doubtful=self._may_be_in_doubt(peer))
        if refused:
            peer.channel.send(Abort(reason[:REASON]))
            self._leaving.append(peer)
        else:
            self._group.part_with(peer, reason)
        if not self._over and of_lead(self._votes(), drop=self._may_go(peer)) is Decision.ABORT:
            raise TransferAborted("the update was aborted", self._losses.told)


def _tensors(
    source: Source, order: Sequence[int], check_open: Callable[[], None]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Number and tensor of all that are in ``order``: in that order if they lie in memory, else in the source's."""
    names = list(source.manifest)
    if isinstance(source, InMemory):
        for number in order:
            yield number, source.borrow(names[number])
        return
    numbers = {names[number]: number for number in order}
    with source.leases() as stream:
        for lease in stream:
            check_open()  # Nobody may want any of them.
            if lease.name in numbers:
                yield numbers[lease.name], lease.tensor


def _is_open(peer: Peer) -> bool:
    return peer.channel.socket.fileno() >= 0


def _is_active(peer: Peer) -> bool:
    return _is_open(peer) and peer.state is not SessionState.IDLE
