"""Outbound: one version on its way from a sender to its receivers, which all commit or all abort."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from ..errors import PeerLost, ProtocolError, TransferAborted, TransferIncomplete
from ..manifest import Manifest, TensorSpec
from ..ranges import Range, disjoint
from ..sources.contracts import InMemory, Source
from .ballot import Ballot, Decision
from .messages import Abort, Accept, Commit, Done, End, Filled, Frame, Offer, Refuse, Release, Wanted, described
from .packing import Packing, Piece, pieces
from .peers import Group, Peer, told
from .report import SendReport
from .slots import WriteSlots
from .states import State
from .waits import left

_OPEN = (State.OFFERED, State.STREAMING, State.ENDED, State.PREPARED, State.REFUSED)


def merged(orders: Sequence[Sequence[int]]) -> list[int]:
    """One order for all: each number once, as early as whoever wants it earliest, in parts of that one's whole."""
    rank: dict[int, float] = {}
    for order in orders:
        for place, number in enumerate(order):
            rank[number] = min(rank.get(number, 1.0), place / len(order))
    return sorted(rank, key=rank.__getitem__)


class Outbound:
    """One update. ``run`` it once."""

    def __init__(
        self,
        group: Group,
        members: Sequence[Peer],
        slots: WriteSlots,
        *,
        update: int,
        timeout: float,
        digests: bool,
        drop: bool,
        advance: Callable[[int], None],
    ) -> None:
        self._group = group
        self._members = list(members)
        self._leaving: list[Peer] = []  # Those that refused, and are yet to say that they put everything back.
        self._slots = slots
        self._update = update
        self._timeout = timeout
        self._hashed = digests
        self._packing = Packing(slots, hashed=digests)
        self._may_lose = drop
        self._over = False  # Nobody is waited for any more but to say goodbye: whoever is lost changes nothing.
        self._advance = advance
        self._began = time.monotonic()
        self._waited: dict[str, float] = {}
        self._lost: dict[str, str] = {}
        self._tensors = self._nbytes = 0

    def run(self, source: Source, version: str | int) -> SendReport:
        """Offer, send, decide.

        Raises:
            TransferAborted: nobody took the version.
            TransferIncomplete: those not named in ``lost`` took it.
            Exception: the source failed; nobody took the version.
        """
        ballot = Ballot.new()
        for peer in self._members:
            peer.wanted, peer.problem = (), ""
            peer.holds.clear()
        try:
            try:
                self._offer(source.manifest, version, ballot)
                self._send(source)
                self._end()
                if ballot.decide(Decision.COMMIT) is Decision.ABORT:
                    raise TransferAborted("the update was aborted", ["a receiver gave up waiting for the decision"])
            except BaseException as error:
                # An interruption may come between the decision and here: then it stands.
                if ballot.decide(Decision.ABORT) is Decision.ABORT:
                    self._abort(error)
                else:
                    self._commit(version)
                raise
            return self._commit(version)
        finally:
            ballot.close()
            for peer in (*self._members, *self._leaving):  # None but after an interruption.
                if peer.state is not State.IDLE:
                    self._group.part_with(peer, "the sender gave up waiting")

    # The steps.

    def _offer(self, manifest: Manifest, version: str | int, ballot: Ballot) -> None:
        offer = Offer(version, self._hashed, described(manifest))
        for peer in self._members:
            peer.channel.send(offer, update=self._update, descriptors=(ballot.descriptor,))
        self._wait(self._in(State.OFFERED), "answer the offer")
        for peer in list(self._members):
            if problem := _problem(peer.wanted, list(manifest.values())):
                self._lose(peer, problem)

    def _send(self, source: Source) -> None:
        asking = list(self._members)
        requests: dict[int, list[tuple[int, tuple[Range, ...]]]] = {}
        for place, peer in enumerate(asking):
            for one in peer.wanted:
                requests.setdefault(one.tensor, []).append((place, one.ranges))
        order = merged([[one.tensor for one in peer.wanted] for peer in asking])
        for number, tensor in _tensors(source, order):
            self._tensors += 1
            for piece in pieces(tensor, requests[number], self._slots.slot_nbytes):
                self._put(number, piece, asking)
        self._hand_over(asking)

    def _put(self, number: int, piece: Piece, asking: Sequence[Peer]) -> None:
        nbytes = piece.range.size
        if not self._packing.has_room(nbytes):
            self._hand_over(asking)
            self._packing.slot = self._free_slot()
        self._packing.put(number, piece)
        self._nbytes += nbytes

    def _hand_over(self, asking: Sequence[Peer]) -> None:
        """Give the slot to all who want something of it; it holds still until the last of them releases it."""
        slot, packed = self._packing.take()
        if slot is None:
            return
        for place, peer in enumerate(asking):
            theirs = tuple(part for part, wanting in packed if place in wanting)
            if theirs and peer in self._members:
                peer.holds.add(slot)
                peer.channel.send(Filled(slot, theirs))
        self._advance(sum(part.range.size for part, _ in packed))
        self._look()

    def _free_slot(self) -> int:
        self._wait(lambda: [] if self._free() else [peer for peer in self._members if peer.holds], "release a slot")
        return self._free()[0]

    def _free(self) -> list[int]:
        held = set().union(*(peer.holds for peer in self._members))
        return [slot for slot in range(len(self._slots.memories)) if slot not in held]

    def _end(self) -> None:
        for peer in self._members:
            peer.channel.send(End())
        self._wait(self._in(State.ENDED, State.STREAMING), "prepare")
        self._look()

    def _commit(self, version: str | int) -> SendReport:
        self._over = True  # The decision stands, whoever is lost from here on.
        members = list(self._members)
        for peer in members:
            peer.channel.send(Commit())
        self._wait(self._in(State.COMMITTED), "say that it has the version")
        self._part()
        committed = tuple(peer.name for peer in self._members)
        after = [peer for peer in members if peer not in self._members]
        if after:
            raise TransferIncomplete(
                f"version {version!r} was taken, and not everybody said so; {', '.join(committed) or 'nobody'} did",
                [f"{peer.name}: {self._lost[peer.name]}" for peer in after],
                committed=committed,
            )
        return SendReport(
            version=version,
            committed=committed,
            lost=dict(self._lost),
            problems={peer.name: peer.problem for peer in self._members if peer.problem},
            tensors=self._tensors,
            nbytes=self._nbytes,
            seconds=time.monotonic() - self._began,
            waited=dict(self._waited),
        )

    def _abort(self, error: BaseException) -> None:
        self._over = True
        for peer in list(self._members):
            if peer.state in _OPEN:
                peer.channel.send(Abort(told(error)[:2000]))
        self._part()

    def _part(self) -> None:
        """Wait for those that abort. Who does not answer is parted with."""
        everybody = [*self._members, *self._leaving]
        self._wait(lambda: [peer for peer in everybody if peer.state is State.ABORTED and _open(peer)], "abort")

    # Waiting.

    def _in(self, *states: State) -> Callable[[], list[Peer]]:
        return lambda: [peer for peer in self._members if peer.state in states]

    def _wait(self, pending: Callable[[], list[Peer]], deed: str) -> None:
        """Until nobody is pending any more. Who is at the deadline is lost."""
        deadline = time.monotonic() + self._timeout
        while waited_for := pending():
            if not left(deadline):
                for peer in waited_for:
                    self._lose(peer, f"it did not {deed} within {self._timeout:g} s")
                continue
            began = time.monotonic()
            self._look(left(deadline))
            for peer in waited_for:
                self._waited[peer.name] = self._waited.get(peer.name, 0.0) + time.monotonic() - began

    def _look(self, seconds: float = 0.0) -> None:
        """Take what comes from anybody within ``seconds``."""
        taking_part = [peer for peer in (*self._members, *self._leaving) if peer.state is not State.IDLE]
        for peer in self._group.wait(taking_part, seconds):
            try:
                # Who is done has said all: what comes after it, a goodbye maybe, is of no update.
                while _open(peer) and peer.state is not State.IDLE and (frame := peer.channel.read()) is not None:
                    self._take(peer, frame)
            except (PeerLost, ProtocolError) as error:
                self._lose(peer, str(error))

    def _take(self, peer: Peer, frame: Frame) -> None:
        match frame.message:
            case Accept(wanted):
                peer.wanted = wanted
            case Release(slots):
                peer.holds.difference_update(slots)
            case Refuse(reasons) if peer.state is State.REFUSED:
                self._lose(peer, "; ".join(reasons))
            case Done(problem):
                peer.problem = problem

    def _lose(self, peer: Peer, reason: str) -> None:
        """Go on without it, or, if nobody may be lost, not at all."""
        refused = peer.state is State.REFUSED and _open(peer)
        self._members = [one for one in self._members if one is not peer]
        self._leaving = [one for one in self._leaving if one is not peer]
        peer.holds.clear()
        self._lost.setdefault(peer.name, reason)
        if refused:
            peer.channel.send(Abort(reason[:2000]))
            self._leaving.append(peer)
        else:
            self._group.part_with(peer, reason)
        if not self._over and not (self._may_lose and self._members):
            told = [f"{name}: {reason}" for name, reason in self._lost.items()]
            raise TransferAborted("the update was aborted", told)


def _tensors(source: Source, order: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """The tensors in ``order`` where any can be had at any time, else as they come."""
    names = list(source.manifest)
    if isinstance(source, InMemory):
        for number in order:
            yield number, source.borrow(names[number])
        return
    numbers = {names[number]: number for number in order}
    with source.leases() as stream:
        for lease in stream:
            if lease.name in numbers:
                yield numbers[lease.name], lease.tensor


def _open(peer: Peer) -> bool:
    return peer.channel.socket.fileno() >= 0


def _problem(wanted: Sequence[Wanted], offered: Sequence[TensorSpec]) -> str:
    """What is wrong with what a receiver wants, if anything."""
    if any(not 0 <= one.tensor < len(offered) for one in wanted) or len({one.tensor for one in wanted}) != len(wanted):
        return "it wants tensors that were not offered, or one twice"
    for one in wanted:
        spec = offered[one.tensor]
        inside = all(each.size and each.fits(spec.nbytes) for each in one.ranges)
        if one.ranges and not (inside and disjoint(one.ranges)):
            return f"it wants bytes of {spec} that there are not, or some twice: {one.ranges}"
    return ""
