"""Round: one version on its way from a sender to its receivers, which all commit or all abort. It opens no socket."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from xxhash import xxh3_64

from ..errors import PeerLost, ProtocolError, TransferAborted, TransferIncomplete
from ..manifest import Manifest
from ..sources.contracts import InMemory, Source
from .ballot import Ballot, Decision
from .group import Group, Peer, told
from .messages import Abort, Accept, Commit, Done, End, Filled, Frame, Offer, Part, Refuse, Release, described
from .parts import flat, parts, put
from .report import SendReport
from .slots import WriteSlots, aligned
from .states import State
from .waiting import left

__all__ = ["Round", "merged"]

_OPEN = (State.OFFERED, State.STREAMING, State.ENDED, State.PREPARED, State.REFUSED)


def merged(orders: Sequence[Sequence[int]]) -> list[int]:
    """One order for all: each number once, as early as whoever wants it earliest, in parts of that one's whole."""
    rank: dict[int, float] = {}
    for order in orders:
        for place, number in enumerate(order):
            rank[number] = min(rank.get(number, 1.0), place / len(order))
    return sorted(rank, key=rank.__getitem__)


class Round:
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
        self._digests: dict[int, xxh3_64] | None = {} if digests else None
        self._may_lose = drop
        self._over = False  # Nobody is waited for any more but to say goodbye: whoever is lost changes nothing.
        self._advance = advance
        self._began = time.monotonic()
        self._waited: dict[str, float] = {}
        self._lost: dict[str, str] = {}
        self._tensors = self._nbytes = 0
        self._slot: int | None = None  # the one that is being filled
        self._parts: list[Part] = []
        self._offset = 0

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

    # The steps.

    def _offer(self, manifest: Manifest, version: str | int, ballot: Ballot) -> None:
        offer = Offer(version, self._digests is not None, described(manifest))
        for peer in self._members:
            peer.channel.send(offer, update=self._update, descriptors=(ballot.descriptor,))
        self._wait(self._in(State.OFFERED), "answer the offer")
        for peer in list(self._members):
            if any(not 0 <= number < len(manifest) for number in peer.wanted) or _twice(peer.wanted):
                self._lose(peer, "it wants tensors that were not offered, or one twice")

    def _send(self, source: Source) -> None:
        for number, tensor in _tensors(source, merged([peer.wanted for peer in self._members])):
            bytes_of = flat(tensor)
            self._tensors += 1
            self._nbytes += bytes_of.nbytes
            for start, part in parts(bytes_of, self._slots.slot_nbytes):
                self._put(number, start, part)
        self._hand_over()

    def _put(self, number: int, start: int, part: torch.Tensor) -> None:
        nbytes = part.nbytes
        if self._slot is None or self._offset + nbytes > self._slots.slot_nbytes:
            self._hand_over()
            self._slot = self._free_slot()
        assert self._slot is not None
        digest = None if self._digests is None else self._digests.setdefault(number, xxh3_64())
        put(part, self._slots.memories[self._slot][self._offset : self._offset + nbytes], digest)
        self._parts.append(Part(number, start, nbytes, self._offset))
        self._offset = aligned(self._offset + nbytes)

    def _hand_over(self) -> None:
        """Give the slot to all who want something of it; it holds still until the last of them releases it."""
        slot, found, self._slot, self._parts, self._offset = self._slot, tuple(self._parts), None, [], 0
        if slot is None:
            return
        for peer in self._members:
            wanted = set(peer.wanted)
            theirs = tuple(part for part in found if part.tensor in wanted)
            if theirs:
                peer.holds.add(slot)
                peer.channel.send(Filled(slot, theirs))
        self._advance(sum(part.nbytes for part in found))
        self._look()

    def _free_slot(self) -> int:
        self._wait(lambda: [] if self._free() else [peer for peer in self._members if peer.holds], "release a slot")
        return self._free()[0]

    def _free(self) -> list[int]:
        held = set().union(*(peer.holds for peer in self._members))
        return [slot for slot in range(len(self._slots.memories)) if slot not in held]

    def _end(self) -> None:
        digests = self._digests
        for peer in self._members:
            told = () if digests is None else tuple(digests[number].intdigest() for number in peer.wanted)
            peer.channel.send(End(told))
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
        try:
            everybody = [*self._members, *self._leaving]
            self._wait(lambda: [peer for peer in everybody if peer.state is State.ABORTED and _open(peer)], "abort")
        except BaseException:
            for peer in [*self._members, *self._leaving]:
                if peer.state is not State.IDLE:
                    self._group.part_with(peer, "the sender gave up waiting")
            raise

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
            case Release(slot):
                peer.holds.discard(slot)
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


def _twice(numbers: Sequence[int]) -> bool:
    return len(set(numbers)) != len(numbers)
