"""Lead: rank 0 of a sharded trainer. It hears in each round what all ranks hold, and tells them how that ended."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from ... import signals
from ...errors import (
    Closed,
    HotweightsError,
    PeerLost,
    ProtocolError,
    TransferAborted,
    TransferError,
    TransferTimeout,
    UsageError,
)
from ...text import some
from ..audience import Audience
from ..report import SendReport
from ..unwritten import of_two_steps
from ..waits import Waker, left
from .copies import Twins, digests_of, twins_of, unequal
from .direct import Direct
from .entrance import Entrance
from .group_place import NEW, GroupPlace, leave_mark
from .holding import Holding, said_of
from .known_rank import KnownRank, RankWatch
from .meeting_place import MeetingPlace
from .round_end import failed, succeeded
from .tiling import Tiling
from .words import (
    Check,
    Checked,
    Compare,
    Compared,
    Complete,
    Describe,
    Described,
    Here,
    Leave,
    Mapped,
    SlotMemory,
    Tick,
    Word,
)

TICK = 1.0
"""Seconds between two words to the ranks while a round goes on."""

_FLUSH = 10.0  # seconds in which a rank takes what it is told last


class Arrived(NamedTuple):
    """All that a rank on another host was to give of a slot is there."""

    slot: int


@signals.held_throughout
class Lead:
    """The other ranks of the group, from rank 0. Owns its sockets; close it.

    Attributes:
        round: the number of the last version.
        ranks: by their number.
        direct: those on other hosts to which receivers come themselves.
    """

    def __init__(
        self, group: Any, place: GroupPlace, places: Sequence[MeetingPlace], timeout: float, compares: bool
    ) -> None:
        """Listen for the ranks.

        Raises:
            AddressTaken: another sender is there.
            UsageError: nobody can listen there.
        """
        self._group, self.place, self._timeout = group, place, timeout
        self.round = 0
        self._lost: list[str] = []
        self._stopped = False
        self._ticked = 0.0
        self._compares = compares
        self._twins: list[Twins] = []
        self._told = False  # whether the ranks know the rows of these
        self._tilings: dict[tuple[bytes, ...], Tiling] = {}
        self._watch: RankWatch | None = None  # once all are there
        self.direct = Direct()
        self._waker = Waker()
        try:
            self._entrance = Entrance(places, place.size)
        except BaseException:
            self._waker.close()
            raise
        self.ranks = self._entrance.ranks

    def meet(self, audience: Audience) -> None:
        """Wait until all ranks are there, and have mapped the slots.

        Raises:
            TransferTimeout: some did not come. Those that did were told so in the same words.
        """
        self._entrance.audience, slots = audience, audience.slots
        mark = leave_mark(self._group, secrets.token_hex(16))
        memory = SlotMemory(len(slots.memories), slots.slot_nbytes, self._timeout, mark)
        try:
            self._await_all()
            for rank in self.ranks.values():
                self._introduce(rank, memory, slots.descriptor)
            self._until(lambda: [rank for rank in self.ranks.values() if not rank.ready], "map the slots")
        except BaseException as error:
            self._tell(failed(0, "", error, "rank 0"))
            raise
        for rank in self.ranks.values():
            rank.link.send(Complete())
        self._flush()
        self._entrance.close()
        self._watch = RankWatch(self.ranks.values())

    def _introduce(self, rank: KnownRank, memory: SlotMemory, descriptor: int) -> None:
        if rank.flow is None:
            rank.link.send(memory, descriptor=descriptor)
            return
        for door in self._entrance.doors:
            door.await_flow(rank.flow)
        rank.link.send(replace(memory, token=rank.flow.token))

    @property
    def far(self) -> frozenset[int]:
        """The ranks on other hosts."""
        return frozenset(rank.rank for rank in self.ranks.values() if rank.flow is not None)

    def refuse(self, error: HotweightsError) -> None:
        """The lead cannot be what it should: the ranks hear so as they come."""
        with contextlib.suppress(TransferError):
            self._await_all()
        self._tell(failed(0, "", error, "rank 0"))

    # A round.

    def send(
        self, version: str | int, held: Holding | UsageError, sending: Callable[[Tiling], SendReport]
    ) -> SendReport:
        """One version: all ranks agree what it is, it is sent, and all hear how that ended."""
        self.round += 1
        try:
            report = sending(self._agree(version, held))
        except BaseException as error:
            self._tell(failed(self.round, version, error, "rank 0"))
            raise
        finally:
            for rank in self.ranks.values():
                if rank.flow is not None:
                    rank.flow.drop()
        self._tell(succeeded(self.round, report))
        return report

    def heard(self) -> Iterator[tuple[KnownRank, Word | Arrived]]:
        """What came of this round. Of a rank that is gone it is that it leaves."""
        began = time.monotonic()
        for rank in self._due(began):
            try:
                rank.link.flush()
                while (word := rank.link.read()) is not None:
                    self._note(rank, word)
                    if getattr(word, "round", self.round) == self.round:
                        yield rank, word
                for _, slot in rank.flow.fill() if rank.flow is not None else ():
                    yield rank, Arrived(slot)
            except (PeerLost, ProtocolError) as error:
                self._lost.append(f"{rank.name}: {error}")
                self._unwatch(rank)
                rank.close()
                rank.left = Leave(self.round, str(error))
                yield rank, rank.left
        if began - self._ticked >= TICK:
            self._ticked = began
            for rank in self.ranks.values():
                if rank.link.is_open and not rank.link.unsent:
                    rank.link.send(Tick(self.round))

    def _due(self, now: float) -> list[KnownRank]:
        """Those to look at: all of them at each tick, which finds links that are cut; else those that spoke."""
        there = [rank for rank in self.ranks.values() if rank.link.is_open]
        if self._watch is None or now - self._ticked >= TICK:
            return there
        spoken = self._watch.spoken()
        return [rank for rank in there if rank in spoken or rank.link.unsent]

    def _unwatch(self, rank: KnownRank) -> None:
        if self._watch is not None:
            self._watch.forget_rank(rank)

    def sockets(self) -> list[tuple[Any, bool]]:
        """What to wait for."""
        ranks = [rank for rank in self.ranks.values() if rank.link.is_open]
        if self._watch is None:
            return [(each, each is rank.link.socket and rank.link.unsent) for rank in ranks for each in rank.sockets]
        return [self._watch.wanted(), *((rank.link.socket, True) for rank in ranks if rank.link.unsent)]

    def looked(self) -> None:
        """Whoever waits for receivers calls this between two looks.

        Raises:
            TransferAborted: a rank has left the round.
        """
        for rank, word in self.heard():
            if isinstance(word, Leave):
                raise left_by(rank, word)

    def part_with(self, number: int) -> None:
        """A rank stands still: whatever it does later, it does it alone."""
        rank = self.ranks[number]
        self._lost.append(f"{rank.name}: it stood still")
        self._unwatch(rank)
        rank.link.say_goodbye("rank 0 gave this rank up, which stood still")

    def fail(self, version: str | int, error: BaseException) -> None:
        """What the lead was to send failed: the ranks hear so."""
        self.round += 1
        self._tell(failed(self.round, version, error, "rank 0"))

    def stop(self) -> None:
        """End every wait. Any thread may call it."""
        self._stopped = True
        self._waker.wake()

    def close(self, reason: str = "rank 0 closed its sender") -> None:
        """Let go. May be called twice."""
        for rank in self.ranks.values():
            self._unwatch(rank)
            rank.link.say_goodbye(reason)
            rank.close()
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self._entrance.close()
        self._waker.close()

    def _agree(self, version: str | int, held: Holding | UsageError) -> Tiling:
        """What all ranks hold together.

        Raises:
            UsageError: it is not all of something, or a rank cannot send it.
            TransferTimeout: a rank did not come.
            TransferAborted: a rank is gone.
        """
        unsent = f"version {version!r} was not sent, and no receiver was told of it"
        if self._lost:
            raise TransferAborted(f"{unsent}; {NEW}", self._lost)
        own = Here(self.round, version, *said_of(held, self._group, self.place))
        self._ticked = 0.0
        self._until(self._absent, "call send", unsent)
        said = {0: own} | {rank.rank: rank.here for rank in self.ranks.values() if rank.here is not None}
        self._check(unsent, said)
        digests = tuple(said[number].table for number in range(self.place.size))
        if digests not in self._tilings:
            self._tilings = {digests: self._tile(unsent, held, digests)}  # The last is kept: a trainer has few shapes.
            self._twins, self._told = twins_of(self._tilings[digests]), False
        if self._compares:
            self._compare(unsent, held)
        return self._tilings[digests]

    def _compare(self, unsent: str, held: Holding | UsageError) -> None:
        """That copies are equal: workers on two hosts could get two values, and the next version others."""
        assert isinstance(held, Holding), "what cannot be sent was found before"
        for twins, digests in zip(self._twins, self._digests(unsent, held, self._twins, again=self._told), strict=True):
            if not unequal(twins, digests):
                continue
            single = [  # Which of them?
                Twins((name,), {rank: (rows[number],) for rank, rows in twins.rows.items()}, twins.alike)
                for number, name in enumerate(twins.names)
            ]
            self._told = False
            said = zip(single, self._digests(unsent, held, single, again=False), strict=True)
            differ = {one.names[0]: ranks for one, digests in said if (ranks := unequal(one, digests))}
            problems = [f"{name!r} has one value on {_among(ranks)}" for name, ranks in differ.items()]
            raise UsageError(
                f"{unsent}: copies of a tensor differ: {some(problems)}. Bring them in line, as data parallel training "
                "does when it begins; Sender(..., compare_copies=False) takes any of them"
            )
        self._told = True

    def _digests(self, unsent: str, held: Holding, listed: Sequence[Twins], *, again: bool) -> list[dict[int, int]]:
        """The digests of each of these, by rank."""
        if not listed:
            return []
        groups: dict[int, list[tuple[int, ...]]] = {}
        for twins in listed:
            for rank, rows in twins.rows.items():
                groups.setdefault(rank, []).append(tuple(row for own in rows for row in own))
        asked = [self.ranks[number] for number in groups if number]
        for other in asked:
            other.compared = None
            other.link.send(Compare(self.round, () if again else tuple(groups[other.rank])))
        own = digests_of(held, groups.get(0, ()))
        self._until(lambda: [rank for rank in asked if rank.compared is None], "compare its copies", unsent)
        said = {0: iter(own)} | {rank.rank: iter(rank.compared.digests) for rank in asked if rank.compared is not None}
        try:
            return [{rank: next(said[rank]) for rank in twins.rows} for twins in listed]
        except StopIteration:
            raise TransferAborted(unsent, ["a rank said fewer digests than it was asked for"]) from None

    def check_unwritten(self) -> None:
        """Ask all ranks whether somebody wrote to what they have given."""
        for rank in self.ranks.values():
            rank.checked = None
            rank.link.send(Check(self.round))

    def unchecked(self) -> list[KnownRank]:
        """Those that have not said it yet."""
        return [rank for rank in self.ranks.values() if rank.checked is None]

    def written(self, held: Holding) -> list[str]:
        """What was written, in words, when all have said it."""
        said = {0: tuple(held.written())} | {
            rank.rank: rank.checked.written for rank in self.ranks.values() if rank.checked is not None
        }
        ranks: dict[tuple[str, ...], list[int]] = {}
        for number, names in sorted(said.items()):
            if names:
                ranks.setdefault(names, []).append(number)
        return [f"{_ranks(numbers, self.place.size)}{of_two_steps(names)}" for names, numbers in ranks.items()]

    def _absent(self) -> list[KnownRank]:
        return [rank for rank in self.ranks.values() if rank.here is None or rank.here.round < self.round]

    def _check(self, unsent: str, said: dict[int, Here]) -> None:
        """Raise what some ranks cannot send, or that they do not send the same."""
        problems: dict[str, list[int]] = {}
        for number, here in sorted(said.items()):
            if here.problem:
                problems.setdefault(here.problem, []).append(number)
        if problems:
            lines = [f"{_ranks(ranks, self.place.size)}{text}" for text, ranks in problems.items()]
            raise UsageError(f"{unsent}: {'; '.join(lines)}")
        versions = {here.version: number for number, here in sorted(said.items(), reverse=True)}
        if len(versions) > 1:
            told = [f"rank {number} sends {version!r}" for version, number in versions.items()]
            raise UsageError(f"the ranks do not send one version: {' and '.join(sorted(told))}. Nobody was told of any")

    def _tile(self, unsent: str, held: Holding | UsageError, digests: tuple[bytes, ...]) -> Tiling:
        assert isinstance(held, Holding), "what cannot be sent was found before"
        numbers = {digest: number for number, digest in enumerate(dict.fromkeys(digests))}
        tables = {digests[0]: held.table}
        asked: dict[bytes, KnownRank] = {}
        for rank in self.ranks.values():
            if digests[rank.rank] not in {*tables, *asked}:
                rank.described = None
                rank.link.send(Describe(self.round))
                asked[digests[rank.rank]] = rank
        self._until(lambda: [rank for rank in asked.values() if rank.described is None], "say what it holds", unsent)
        for digest, rank in asked.items():
            assert rank.described is not None
            tables[digest] = rank.described.table
        try:
            return Tiling([tables[digest] for digest in numbers], [numbers[digest] for digest in digests])
        except UsageError as error:
            raise UsageError(f"{unsent}: {error}") from error

    # Waiting.

    def _await_all(self) -> None:
        deadline = time.monotonic() + self._timeout
        while True:
            self._entrance.admit()
            if not (missing := self._entrance.missing):
                return
            if not left(deadline):
                one = some([str(number) for number in missing])
                raise TransferTimeout(
                    f"rank {one} of {self.place.size} did not make its Sender within {self._timeout:g} s; each rank "
                    f"of group= makes one, at the same address",
                    self._entrance.refused,
                )
            self._wait([*self._entrance.sockets(), *self.sockets()], min(TICK, left(deadline)))

    def _until(self, pending: Callable[[], list[KnownRank]], deed: str, title: str = "") -> None:
        """Wait until no rank is pending; ``title`` begins the error."""
        deadline = time.monotonic() + self._timeout
        before = f"{title}: " if title else ""
        while True:
            self._entrance.admit_flows()
            for _ in self.heard():
                pass
            for rank in self.ranks.values():
                if rank.left is not None and rank.left.round >= self.round:
                    raise left_by(rank, rank.left, title or "there is no sender")
            waiting = pending()
            if not waiting:
                return
            if not left(deadline):
                who = some([str(rank.rank) for rank in waiting])
                raise TransferTimeout(f"{before}rank {who} did not {deed} within {self._timeout:g} s")
            self._wait([*self._entrance.flow_sockets(), *self.sockets()], min(TICK, left(deadline)))

    def _wait(self, sockets: list[tuple[Any, bool]], seconds: float) -> None:
        self._waker.wait(sockets, seconds, lambda: self._stopped)
        if self._stopped:
            raise Closed("the sender was closed")

    def _note(self, rank: KnownRank, word: Word) -> None:
        match word:
            case Here():
                rank.here = word
            case Leave():
                rank.left = word
            case Described(round) if round == self.round:
                rank.described = word
            case Compared(round) if round == self.round:
                rank.compared = word
            case Checked(round) if round == self.round:
                rank.checked = word
            case Mapped(port):
                rank.mapped, rank.port = True, port

    def _tell(self, outcome: Word) -> None:
        for rank in self.ranks.values():
            if rank.link.is_open:
                rank.link.send(outcome)
        self._flush()

    def _flush(self) -> None:
        deadline = time.monotonic() + min(_FLUSH, self._timeout)
        while True:
            unsent = [rank.link for rank in self.ranks.values() if rank.link.is_open and rank.link.unsent]
            for link in unsent:
                link.flush()
            unsent = [link for link in unsent if link.unsent]
            if not unsent or not left(deadline) or self._stopped:
                return
            self._waker.wait([(link.socket, True) for link in unsent], left(deadline), lambda: self._stopped)


def left_by(rank: KnownRank, word: Leave, title: str = "the update was aborted") -> TransferError:
    """The error when a rank leaves a round."""
    return TransferTimeout(word.reason) if word.late else TransferAborted(title, [f"{rank.name}: {word.reason}"])


def _among(ranks: list[list[int]]) -> str:
    return " and another on ".join(f"rank {some([str(rank) for rank in own])}" for own in ranks)


def _ranks(ranks: list[int], size: int) -> str:
    return "" if len(ranks) == size else f"rank {some([str(rank) for rank in ranks])}: "
