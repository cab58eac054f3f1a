"""Rank: a rank of a sharded trainer that does not lead. It says what it holds, and fills slots as it is told."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from typing import Any

import torch

from ... import signals
from ...errors import Closed, PeerLost, ProtocolError, TransferError, TransferTimeout, UsageError
from ...memory.host import host_empty
from ..flow import Waitable
from ..peers import told
from ..report import SendReport
from ..waits import Waker, left
from .copies import digests_of
from .filling import fill
from .giving import Giving
from .group_place import NEW, GroupPlace, has_mark
from .holding import Holding, said_of
from .link import Link
from .meeting_place import MeetingPlace
from .network_link import NetworkLink
from .rank_flow import RankOutflow, stretch_of
from .round_end import error_of, report_of
from .words import (
    Check,
    Checked,
    Compare,
    Compared,
    Complete,
    Describe,
    Described,
    Dismiss,
    Expect,
    Fill,
    Give,
    Here,
    Join,
    Leave,
    Mapped,
    Met,
    Packed,
    RoundEnd,
    Severed,
    SlotMemory,
    Tick,
    Word,
)

_RETRY = 0.02  # seconds between two tries to connect
_LOOK = 1.0  # seconds between two looks at a link to another host
_GRACE = 5.0  # seconds that the lead's words may come late


class RankSlots:
    """The lead's slots, mapped to be written.

    Attributes:
        memories: one ``uint8 [slot_nbytes]`` for each slot.
    """

    def __init__(self, descriptor: int, slots: int, slot_nbytes: int) -> None:
        """The descriptor stays the caller's."""
        nbytes = slots * slot_nbytes
        try:
            whole = torch.frombuffer(mmap.mmap(descriptor, nbytes), dtype=torch.uint8, count=nbytes)
        except (OSError, ValueError) as error:
            raise TransferError(f"the slots of rank 0 cannot be mapped: {error}") from error
        self.memories: tuple[torch.Tensor, ...] = torch.split(whole, slot_nbytes)

    def close(self) -> None:
        """Let go."""
        self.memories = ()


class FarSlots:
    """A rank's own slots, on another host than the lead's: what it packs there goes by flows.

    Attributes:
        memories: as ``RankSlots`` has them.
        flow: to the lead.
        giving: to receivers.
    """

    def __init__(self, flow: RankOutflow, giving: Giving, slots: int, slot_nbytes: int) -> None:
        """Takes over the flows."""
        self.flow, self.giving = flow, giving
        try:
            self.memories: tuple[torch.Tensor, ...] = tuple(
                host_empty((slot_nbytes,), torch.uint8) for _ in range(slots)
            )
        except (MemoryError, RuntimeError) as error:
            flow.close()
            giving.close()
            raise TransferError(f"no memory for {slots} slots of {slot_nbytes} bytes: {error}") from error

    @property
    def waiting(self) -> list[tuple[Waitable, bool]]:
        """What to wait for before more can be sent."""
        own = self.flow.waiting
        return [*self.giving.sockets(), *(() if own is None else (own,))]

    def close(self) -> None:
        """Let go. May be called twice."""
        self.flow.close()
        self.giving.close()
        self.memories = ()


@signals.held_throughout
class Rank:
    """One rank, from its own side. Owns its socket; close it.

    Attributes:
        address: where the ranks meet.
        state: which it is, in words.
    """

    def __init__(self, group: Any, place: GroupPlace, places: Sequence[MeetingPlace], timeout: float) -> None:
        """Meet the lead and all other ranks.

        Raises:
            TransferTimeout: not all came.
            TransferError: the lead sent it away.
        """
        self._group, self.place, self._timeout = group, place, timeout
        self._places = places
        self.address, self.state = places[0].address, f"rank {place.rank} of {place.size}"
        self._round = 0
        self._groups: tuple[tuple[int, ...], ...] = ()  # of rows that others hold, too
        self._heard = False  # whether the lead said something since this rank said that it is here
        self._stopped = False
        self._lost = ""
        self._waker = Waker()
        self.slots: RankSlots | FarSlots | None = None
        deadline = time.monotonic() + timeout
        try:
            self._link, self._place = self._connect(deadline)
        except BaseException:
            self._waker.close()
            raise
        try:
            while not self._meet(left(deadline) > 0):
                self._link.close()
                self._wait([], min(_RETRY, left(deadline)))
                self._link, self._place = self._connect(deadline)
        except BaseException as error:
            self._link.say_goodbye(told(error))
            self.close()
            raise

    def _connect(self, deadline: float) -> tuple[Link, MeetingPlace]:
        """A link that stands, and where."""
        why = ""
        while True:
            for place in self._places:
                link = place.reach()
                if link is None:
                    continue
                try:
                    if self._stands(link, deadline):
                        return link, place
                except PeerLost as error:
                    why = f" ({error})"
                except BaseException:
                    link.close()
                    raise
                link.close()
            if not left(deadline):
                where = " or ".join(place.address for place in self._places)
                raise TransferTimeout(
                    f"rank 0 of {self.place.size} did not make its Sender within {self._timeout:g} s; each rank of "
                    f"group= makes one, at the same address: they meet at {where}{why}"
                )
            self._wait([], min(_RETRY, left(deadline)))

    def _stands(self, link: Link, deadline: float) -> bool:
        while isinstance(link, NetworkLink) and not link.stands():
            if not left(deadline):
                return False
            self._wait([(link.socket, True)], left(deadline))
        return True

    def _meet(self, may_try_again: bool) -> bool:
        """Be taken by the lead. Returns false if nobody there waits for a rank yet, and there is time."""
        self._link.send(Join(self.place.rank, self.place.size, os.getpid()))
        try:
            memory = self._next()
        except PeerLost:
            if self._link.shares or self._link.heard or not may_try_again:
                raise
            return False  # Who listens there is no lead: that of an older trainer, which ends.
        if not isinstance(memory, SlotMemory):
            raise ProtocolError("rank 0 says first where the slots are")
        self._timeout = memory.timeout
        if memory.mark and not has_mark(self._group, memory.mark):
            raise ProtocolError(
                f"rank {self.place.rank}: its process group is not that of rank 0: it is a stale one, of a trainer "
                "that was here before, or another"
            )
        self.slots = self._slots_of(memory)
        self._link.send(Mapped(self.slots.giving.port if isinstance(self.slots, FarSlots) else 0))
        if not isinstance(self._next(), Complete):
            raise ProtocolError("rank 0 says when all ranks are there")
        return True

    def _slots_of(self, memory: SlotMemory) -> RankSlots | FarSlots:
        if memory.token:
            flow, giving = self._place.flow(memory.token), Giving(self._link.socket.getsockname())
            return FarSlots(flow, giving, memory.slots, memory.slot_nbytes)
        descriptor = self._link.take_descriptor()
        if descriptor is None:
            raise ProtocolError("rank 0 sent no slots")
        try:
            return RankSlots(descriptor, memory.slots, memory.slot_nbytes)
        finally:
            os.close(descriptor)

    def _next(self) -> Word:
        deadline = time.monotonic() + 2 * self._timeout + _GRACE
        while isinstance(word := self._link.read(), Tick) or word is None:
            if word is not None:
                continue
            if not left(deadline):
                raise TransferTimeout(f"rank 0 said nothing for {2 * self._timeout + _GRACE:g} s; {NEW}")
            self._listen(left(deadline))
        if isinstance(word, RoundEnd) and (error := error_of(word)) is not None:
            raise error
        return word

    def send(self, version: str | int, held: Holding | UsageError) -> SendReport:
        """Say what this rank holds of a version, and do what the lead says until it says how that ended.

        Raises:
            HotweightsError: what the lead raises, in the same words.
            PeerLost: the lead is gone; receivers have this version or the one before, all the same.
        """
        if self._lost:
            raise PeerLost(f"version {version!r} was not sent: {self._lost}; {NEW}")
        self._round += 1
        self._heard = False
        try:
            self._catch_up(version)
            digest, problem = said_of(held, self._group, self.place)
            self._link.send(Here(self._round, version, digest, problem))
            return self._serve(version, held)
        except _Ended as ended:
            raise ended.error from None
        except (PeerLost, ProtocolError) as error:
            self._lost = f"rank 0, which leads, is lost: {error}"
            self._link.close()
            raise PeerLost(
                f"{self._lost}. The receivers took version {version!r}, or all of them hold the one before; {NEW}"
            ) from error
        except BaseException as error:  # Ctrl-C, or a tensor that cannot be read: the others are not left waiting.
            late = isinstance(error, TransferTimeout)
            self._link.send(Leave(self._round, told(error), late))
            if late and self._heard:
                self._lost = "rank 0, which leads, stands still"
                self._link.close()
            raise

    def _catch_up(self, version: str | int) -> None:
        """Hear how rounds ended for which this rank did not come. One of this version is the one of this call."""
        while (word := self._link.read()) is not None:
            if isinstance(word, RoundEnd) and word.round >= self._round:
                self._round = word.round
                if word.version == version:
                    self._end(word)
                self._round += 1

    def _serve(self, version: str | int, held: Holding | UsageError) -> SendReport:
        limit = time.monotonic() + self._timeout
        while True:
            while (word := self._link.read()) is not None:
                self._heard, limit = True, time.monotonic() + self._timeout + _GRACE
                if getattr(word, "round", -1) != self._round:
                    continue
                if isinstance(word, RoundEnd):
                    return self._end(word)
                self._do(word, held)
            self._let_in()
            if not left(limit):
                raise TransferTimeout(self._silence(version))
            self._listen(left(limit))

    def _silence(self, version: str | int) -> str:
        if self._heard:
            return f"rank 0, which leads, stood still for {self._timeout + _GRACE:g} s; {NEW}"
        return (
            f"version {version!r} was not sent, and no receiver was told of it: rank 0 did not call send within "
            f"{self._timeout:g} s"
        )

    def _end(self, outcome: RoundEnd) -> SendReport:
        if (error := error_of(outcome)) is not None:
            raise _Ended(error)
        return report_of(outcome)

    def _do(self, word: Word, held: Holding | UsageError) -> None:
        assert self.slots is not None
        assert isinstance(held, Holding) or not isinstance(word, (Describe, Compare, Check, Fill)), (
            "the lead knows that there is none"
        )
        match word:
            case Describe():
                self._link.send(Described(self._round, held.table))  # type: ignore[union-attr]
            case Compare(_, groups):
                self._groups = groups or self._groups
                self._link.send(Compared(self._round, digests_of(held, self._groups)))  # type: ignore[arg-type]
            case Check():
                self._link.send(Checked(self._round, tuple(held.written())))  # type: ignore[union-attr]
            case Fill(_, slot, tasks):
                digests = fill(memory := self.slots.memories[slot], tasks, held)  # type: ignore[arg-type]
                if isinstance(self.slots, FarSlots):
                    self.slots.flow.give(self._round, slot, memory, [stretch_of(task) for task in tasks if task.comes])
                self._link.send(Packed(self._round, slot, digests))
                self._flush()
            case Expect() | Give() | Dismiss():
                if not isinstance(self.slots, FarSlots):
                    raise ProtocolError("rank 0 has a rank of its own host send bytes to receivers")
                self.slots.giving.do(word, self.slots.memories)
                self._let_in()
                self._flush()

    def _listen(self, seconds: float) -> None:
        """Wait for a word, and send what waits."""
        sockets: list[tuple[Waitable, bool]] = [(self._link.socket, self._link.unsent)]
        if isinstance(self.slots, FarSlots):
            sockets += self.slots.waiting
        # A link between hosts is looked at each second.
        self._wait(sockets, seconds if self._link.shares else min(seconds, _LOOK))
        self._link.flush()
        self._flush()

    def _let_in(self) -> None:
        """Let receivers in: when all is read that rank 0 has said, for who comes before it was told of is refused."""
        if isinstance(self.slots, FarSlots) and (met := self.slots.giving.met()):
            self._link.send(Met(self._round, met))

    def _flush(self) -> None:
        """Send what waits."""
        if not isinstance(self.slots, FarSlots):
            return
        self.slots.flow.flush()
        for place, reason in self.slots.giving.flush():
            self._link.send(Severed(self._round, place, reason))

    def _wait(self, sockets: list[tuple[Waitable, bool]], seconds: float) -> None:
        self._waker.wait(sockets, seconds, lambda: self._stopped)
        if self._stopped:
            raise Closed("the sender was closed")

    def fail(self, version: str | int, error: BaseException) -> None:
        """What this rank was to send failed: the lead hears so, and all others by it."""
        self._round += 1
        if self._link.is_open:
            self._link.send(Leave(self._round, told(error)))

    def stop(self) -> None:
        """End every wait. Any thread may call it."""
        self._stopped = True
        self._waker.wake()

    def close(self) -> None:
        """Let go. May be called twice."""
        self._link.say_goodbye(f"rank {self.place.rank} closed its sender")
        if self.slots is not None:
            self.slots.close()
        self._waker.close()


class _Ended(Exception):
    """The round ended in an error, which the lead told."""

    def __init__(self, error: Exception) -> None:
        self.error = error
