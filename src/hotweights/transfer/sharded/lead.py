"""Lead: rank 0 of a sharded trainer. It meets the other ranks, and hears in each round what they hold."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

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
from ..address import Listener, check_peer
from ..report import SendReport
from ..shared_memory import WriteSlots
from ..waits import Waker, left
from .group_place import NEW, GroupPlace, leave_mark
from .holding import Holding, said_of
from .link import Link, listening_at
from .round_end import failed, succeeded
from .tiling import Tiling
from .words import Complete, Describe, Described, Here, Join, Leave, Mapped, SlotMemory, Tick, Word

TICK = 1.0
"""Seconds between two words to the ranks while a round goes on."""

_FLUSH = 10.0  # seconds in which a rank takes what it is told last


class KnownRank:
    """A rank, as the lead knows it.

    Attributes:
        rank: in the group.
        link: to it.
        name: for people.
        here: what it last said that it sends.
        left: the last round that it gave up, and why.
        table: what it last said it holds.
    """

    def __init__(self, rank: int, link: Link, pid: int) -> None:
        self.rank, self.link, self.name = rank, link, f"rank {rank} (process {pid})"
        self.here: Here | None = None
        self.left: Leave | None = None
        self.described: Described | None = None
        self.mapped = False


@signals.held_throughout
class Lead:
    """The other ranks of the group, from rank 0. Owns its sockets; close it."""

    def __init__(self, group: Any, place: GroupPlace, path: str, timeout: float) -> None:
        """Listen for the ranks.

        Raises:
            AddressTaken: another sender is there.
            UsageError: nobody can listen there.
        """
        self._group, self.place, self._timeout = group, place, timeout
        self.ranks: dict[int, KnownRank] = {}
        self.round = 0
        self._lost: list[str] = []
        self._stopped = False
        self._ticked = 0.0
        self._tilings: dict[tuple[bytes, ...], Tiling] = {}
        self._waker = Waker()
        try:
            self._listener: Listener | None = Listener(listening_at(path))
        except BaseException:
            self._waker.close()
            raise

    def meet(self, slots: WriteSlots) -> None:
        """Wait until all ranks are there, and have mapped the slots.

        Raises:
            TransferTimeout: some did not come. Those that did were told so in the same words.
        """
        mark = leave_mark(self._group, secrets.token_hex(16))
        memory = SlotMemory(len(slots.memories), slots.slot_nbytes, self._timeout, mark)
        try:
            self._await_all()
            for rank in self.ranks.values():
                rank.link.send(memory, descriptor=slots.descriptor)
            self._until(lambda: [rank for rank in self.ranks.values() if not rank.mapped], "map the slots")
        except BaseException as error:
            self._tell(failed(0, "", error, "rank 0"))
            raise
        for rank in self.ranks.values():
            rank.link.send(Complete())
        self._flush()
        self._stop_listening()

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
        self._tell(succeeded(self.round, report))
        return report

    def heard(self) -> Iterator[tuple[KnownRank, Word]]:
        """What came of this round. Of a rank that is gone it is that it leaves."""
        for rank in list(self.ranks.values()):
            if not rank.link.is_open:
                continue
            try:
                rank.link.flush()
                while (word := rank.link.read()) is not None:
                    self._note(rank, word)
                    if getattr(word, "round", self.round) == self.round:
                        yield rank, word
            except (PeerLost, ProtocolError) as error:
                self._lost.append(f"{rank.name}: {error}")
                rank.link.close()
                rank.left = Leave(self.round, str(error))
                yield rank, rank.left
        if time.monotonic() - self._ticked >= TICK:
            self._ticked = time.monotonic()
            for rank in self.ranks.values():
                if rank.link.is_open and not rank.link.unsent:
                    rank.link.send(Tick(self.round))

    def sockets(self) -> list[tuple[Any, bool]]:
        """What to wait for."""
        return [(rank.link.socket, rank.link.unsent) for rank in self.ranks.values() if rank.link.is_open]

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
            rank.link.say_goodbye(reason)
        self._stop_listening()
        self._waker.close()

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

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
        return self._tilings[digests]

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
        strangers: list[tuple[Link, int]] = []
        while True:
            self._admit(strangers)
            missing = [number for number in range(1, self.place.size) if number not in self.ranks]
            if not missing:
                return
            if not left(deadline):
                one = some([str(number) for number in missing])
                raise TransferTimeout(
                    f"rank {one} of {self.place.size} did not make its Sender within {self._timeout:g} s; each rank "
                    f"of group= makes one, on the host of rank 0"
                )
            assert self._listener is not None
            sockets = [(self._listener.socket, False), *((link.socket, False) for link, _ in strangers)]
            self._wait([*sockets, *self.sockets()], left(deadline))

    def _admit(self, strangers: list[tuple[Link, int]]) -> None:
        """Take those who connect, and hear which rank each of them is."""
        assert self._listener is not None
        while (accepted := self._listener.accept()) is not None:
            try:
                strangers.append((Link(accepted), check_peer(accepted)))
            except ProtocolError:
                accepted.close()
        for stranger in list(strangers):
            link, pid = stranger
            try:
                word = link.read()
                if word is None:
                    continue
                strangers.remove(stranger)
                self._place_of(link, pid, word)
            except (PeerLost, ProtocolError) as error:
                strangers.remove(stranger) if stranger in strangers else None
                link.say_goodbye(str(error))
        for number, rank in list(self.ranks.items()):  # One that gave up is waited for again.
            try:
                rank.link.read()
            except (PeerLost, ProtocolError):
                rank.link.close()
                del self.ranks[number]

    def _place_of(self, link: Link, pid: int, word: Word) -> None:
        if not isinstance(word, Join):
            raise ProtocolError("a rank says first which it is")
        if word.size != self.place.size or not 0 < word.rank < word.size:
            raise ProtocolError(
                f"rank {word.rank} of {word.size} came to rank 0 of {self.place.size}: its process group is a stale "
                "one, or another"
            )
        if word.rank in self.ranks:
            raise ProtocolError(f"rank {word.rank} is here already: {self.ranks[word.rank].name}; end one of the two")
        self.ranks[word.rank] = KnownRank(word.rank, link, pid)

    def _until(self, pending: Callable[[], list[KnownRank]], deed: str, title: str = "") -> None:
        """Wait until no rank is pending; ``title`` begins the error."""
        deadline = time.monotonic() + self._timeout
        before = f"{title}: " if title else ""
        while True:
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
            self._wait(self.sockets(), min(TICK, left(deadline)))

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
            case Mapped():
                rank.mapped = True

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


def _ranks(ranks: list[int], size: int) -> str:
    return "" if len(ranks) == size else f"rank {some([str(rank) for rank in ranks])}: "
