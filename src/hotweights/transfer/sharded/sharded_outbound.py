"""ShardedOutbound: an ``Outbound`` whose slots several ranks fill, each with what it holds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from msgspec.structs import replace

from ... import signals
from ...errors import TransferAborted, UsageError
from ...manifest import Manifest
from ...ranges import Range, scaled
from ...text import some
from ...timeline import Timeline
from ..flow import GAP, Waitable
from ..messages import Chunk, Offer, described
from ..outbound import Outbound
from ..peers import Peer, PeerGroup
from ..registers.register import Register
from ..report import SendReport
from ..shared_memory import WriteSlots, aligned
from ..states import SessionState
from ..waits import left
from .direct import PATIENCE
from .filling import digest_of, fill
from .holding import Holding
from .lead import TICK, Arrived, Lead, left_by
from .rank_flow import packed
from .tiling import ChunkJob, Tiling
from .words import Fill, Give, Leave, Met, Packed, Severed, Task


@dataclass(eq=False)
class SlotInWork:
    """A slot that ranks fill.

    Attributes:
        slot: its number.
        jobs: what it is to hold, and from which byte on each of them lies, and in which dtype if not its own.
        waiting: ranks that have not filled their part, and since when each is waited for.
        hashed: by rank, the jobs of which it says the digest.
        digests: by the number of the job.
        halves: of ranks on other hosts that have said that they packed it, or whose bytes are there: one is missing.
        origins: ranks that send a chunk themselves, by its first byte.
    """

    slot: int
    jobs: list[tuple[ChunkJob, int, str]] = field(default_factory=list)
    waiting: dict[int, float] = field(default_factory=dict)
    hashed: dict[int, list[int]] = field(default_factory=dict)
    digests: dict[int, int] = field(default_factory=dict)
    halves: set[int] = field(default_factory=set)
    origins: dict[int, int] = field(default_factory=dict)


@signals.held_throughout
class ShardedOutbound(Outbound):
    """One version of a sharded trainer. ``give`` it once."""

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
        needed: int,
        register: Register | None,
        epoch: int,
        advance: Callable[[int], None],
        timeline: Timeline,
        lead: Lead,
        tiling: Tiling,
        held: Holding,
    ) -> None:
        """``held``: what this rank holds, which leads."""
        super().__init__(
            group,
            members,
            slots,
            update=update,
            timeout=timeout,
            digests=digests,
            drop=drop,
            needed=needed,
            register=register,
            epoch=epoch,
            advance=advance,
            timeline=timeline,
        )
        self._lead = lead
        self._tiling = tiling
        self._held = held
        self._next: SlotInWork | None = None  # what the ranks are told to fill next
        self._offset = 0
        self._in_work: deque[SlotInWork] = deque()  # in the order in which they are handed over
        self._asking: list[Peer] = []
        self._casts: dict[tuple[int, int], str] = {}  # to what a receiver casts a tensor, by its place
        self._checking: float | None = None  # since when the ranks are asked what was written
        self._direct = lead.direct
        self._reached: dict[int, frozenset[int]] = {}  # by rank, the places in ``_asking`` of those who come to it
        self._told: SlotInWork | None = None  # what receivers are being told of
        self._given: dict[int, list[tuple[int, tuple[tuple[int, int], ...]]]] = {}  # of that, by rank, as in ``Give``
        self._givers: dict[int, set[int]] = {}  # of each slot, the ranks that send some of it themselves

    def give(self, version: str | int) -> SendReport:
        """Offer, send, decide, as ``Outbound.run``.

        Raises:
            TransferAborted: a rank or a receiver was lost; nobody took the version.
        """
        specs = self._tiling.specs()
        register = "" if self._register is None else self._register.told
        try:
            self._direct.begin(self._lead.round, self._lead.ranks.values(), self._members)
            offer = Offer(
                version,
                self._hashed,
                described(Manifest(specs)),
                register=register,
                epoch=self._epoch,
                drop=self._may_lose,
                patience=self._timeout,
            )
            return self._run(version, specs, lambda: offer, self._send_tiles)
        finally:
            self._ballot.close()

    def _own(self, offer: Offer, peer: Peer) -> Offer:
        return replace(super()._own(offer, peer), origins=self._direct.origins(peer))

    def _meet(self) -> None:
        """Give receivers the time to come to ranks of other hosts. What a receiver cannot reach goes by this one."""
        deadline = time.monotonic() + PATIENCE
        if self._direct.unsure:
            with self._timeline.event("wait for ranks"):
                while self._direct.unsure and left(deadline):
                    self._look(left(deadline))
        self._direct.settle()
        self._reached = {
            rank: frozenset(place for place, peer in enumerate(self._asking) if self._direct.reaches(peer, rank))
            for rank in self._direct.ranks
        }

    def _send_tiles(self) -> None:
        self._asking, requests, order = self._requests()
        wishes = [wanted for peer in self._members for wanted in peer.wanted]
        self._casts = {
            (place, want.tensor): want.rounded for place, wish in enumerate(wishes) for want in wish if want.rounded
        }
        casts = order if self._casts else ()
        rounded = {number: dtype for number in casts if (dtype := self._rounding(number, requests[number]))}
        tiling = self._tiling.rounded(rounded) if rounded else self._tiling
        self._meet()
        everyone = len(self._asking)
        far = [rank for rank in self._lead.far if len(self._reached.get(rank, ())) < everyone]
        tiling.begin(far, apart=any(self._reached.values()))
        for number in order:
            self._tensors += 1
            own, dtype = requests[number], rounded.get(number, "")
            if dtype:
                shrunk = self._shrunk(number, dtype)
                own = [(place, tuple(scaled(part, 1, shrunk) for part in ranges)) for place, ranges in own]
            for job in tiling.jobs(number, own, self._slots.slot_nbytes):
                self._add(job, dtype)
        self._start()
        with self._timeline.event("wait for ranks"):
            self._await_ranks(lambda: bool(self._in_work))
            self._lead.check_unwritten()
            self._checking = time.monotonic()
            self._await_ranks(lambda: bool(self._lead.unchecked()))
            self._checking = None
        if written := self._lead.written(self._held):
            raise UsageError("; ".join(written))

    def _rounding(self, number: int, requests: Sequence[tuple[int, tuple[Range, ...]]]) -> str:
        """The dtype to which all who want a tensor cast it; empty where they do not, or differ."""
        said = {self._casts.get((place, number), "") for place, _ in requests}
        dtype = said.pop() if len(said) == 1 else ""
        spec, narrow = self._tiling.tensors[number].spec, getattr(torch, dtype, None)
        if not isinstance(narrow, torch.dtype) or not isinstance(spec.dtype, torch.dtype) or not spec.nbytes:
            return ""
        item = spec.dtype.itemsize
        floats = spec.dtype.is_floating_point and narrow.is_floating_point
        cuts = (cut for _, ranges in requests for part in ranges for cut in (part.start, part.nbytes, part.stride))
        return dtype if floats and 1 < narrow.itemsize < item and not any(cut % item for cut in cuts) else ""

    def _shrunk(self, number: int, dtype: str) -> int:
        """How much smaller its elements are in that dtype."""
        wide, narrow = self._tiling.tensors[number].spec.dtype, getattr(torch, dtype)
        assert isinstance(wide, torch.dtype)
        assert isinstance(narrow, torch.dtype)
        return wide.itemsize // narrow.itemsize

    def _add(self, job: ChunkJob, dtype: str) -> None:
        stop = self._offset + job.range.size
        if self._next is None or stop > self._slots.slot_nbytes:
            self._start()
            self._next, self._offset = SlotInWork(self._slot_for_ranks()), 0
            self._slots.roll.note_fill(self._next.slot, 0)
            stop = job.range.size
        self._next.jobs.append((job, self._offset, dtype))
        self._offset = aligned(stop)
        self._nbytes += job.range.size

    def _start(self) -> None:
        """Have the ranks fill the slot, this one too."""
        work, self._next = self._next, None
        if work is None:
            return
        tasks: dict[int, list[Task]] = {}
        for number, (job, offset, dtype) in enumerate(work.jobs):
            for share in job.shares:
                task = job.task(share, offset, dtype, hashed=self._hashed)
                if (reached := self._reached_by(job)) and (straight := job.asking & reached):
                    work.origins[offset] = share.rank
                    task = replace(task, comes=straight != job.asking)
                tasks.setdefault(share.rank, []).append(task)
                if task.hashed:
                    work.hashed.setdefault(share.rank, []).append(number)
        self._in_work.append(work)
        now = time.monotonic()
        for rank in sorted(tasks.keys() - {0}):
            work.waiting[rank] = now
            self._have_filled(rank, work.slot, tasks[rank])
        if 0 in tasks:
            with self._timeline.event(self._filling):
                self._note(work, 0, fill(self._slots.memories[work.slot], tasks[0], self._held))
        self._look()

    def _have_filled(self, number: int, slot: int, tasks: Sequence[Task]) -> None:
        rank, theirs = self._lead.ranks[number], tuple(tasks)
        if rank.flow is not None:
            theirs, landings = packed(tasks)
            rank.flow.expect(self._lead.round, slot, self._slots.memories[slot], landings)
        rank.link.send(Fill(self._lead.round, slot, theirs))

    def _reached_by(self, job: ChunkJob) -> frozenset[int]:
        """Who can be sent a chunk by the rank that makes all of it. What is short goes with what others make."""
        share = job.shares[0] if len(job.shares) == 1 and job.range.size > GAP else None
        return frozenset() if share is None else self._reached.get(share.rank, frozenset())

    def _slot_for_ranks(self) -> int:
        while not (free := self._free()):
            if any(peer.holds for peer in self._members):
                with self._timeline.event("wait for a free slot"):
                    self._wait(self._holding_all, "release a slot")
            else:
                with self._timeline.event("wait for ranks"):
                    self._await_ranks(lambda: not self._free() and not any(peer.holds for peer in self._members))
        return free[0]

    def _holding_all(self) -> list[Peer]:
        return [] if self._free() else [peer for peer in self._members if peer.holds]

    def _free(self) -> list[int]:
        in_work = {work.slot for work in self._in_work}
        return [slot for slot in super()._free() if slot not in in_work]

    def _await_ranks(self, pending: Callable[[], bool]) -> None:
        while pending():
            self._look(TICK)

    def _look(self, seconds: float = 0.0) -> None:
        super()._look(min(seconds, TICK))

    def _also(self) -> list[tuple[Waitable, bool]]:
        return list(self._lead.sockets())

    def _looked(self) -> None:
        for rank, word in self._lead.heard():
            if isinstance(word, Leave) and not self._over:
                raise left_by(rank, word)
            if isinstance(word, Packed) and not self._over:
                self._packed(rank.rank, word)
            if isinstance(word, Arrived) and not self._over:
                self._came(rank.rank, word.slot)
            if isinstance(word, Met):
                self._direct.note(rank.rank, word.places)
            if isinstance(word, Severed) and not self._over:
                self._sever(rank.name, word)
        if not self._over:
            self._hand_over_filled()
            self._check_late()

    def _sever(self, rank: str, word: Severed) -> None:
        for peer in [peer for peer in self._members if peer.place == word.place]:
            super()._lose(peer, f"{rank} cannot send it anything any more: {word.reason}")
            self._direct.dismiss(peer)

    def _lose(self, peer: Peer, reason: str) -> None:
        if peer.state is SessionState.STREAMING and peer.channel.socket.fileno() >= 0:
            givers = set[int]().union(*(self._givers.get(slot, ()) for slot in peer.holds))
            reason += f"; rank {some([str(rank) for rank in sorted(givers)])} had bytes for it" if givers else ""
        super()._lose(peer, reason)
        self._direct.dismiss(peer)  # Before a slot that it held is filled again.

    def _packed(self, rank: int, word: Packed) -> None:
        work = next((work for work in self._in_work if work.slot == word.slot), None)
        if work is None or rank not in work.waiting or len(word.digests) != len(work.hashed.get(rank, ())):
            raise TransferAborted("the update was aborted", [f"rank {rank}: it filled what it was not asked for"])
        self._note(work, rank, word.digests)
        self._came(rank, word.slot)

    def _came(self, rank: int, slot: int) -> None:
        work = next(work for work in self._in_work if work.slot == slot)
        if rank in self._lead.far and rank not in work.halves:
            work.halves.add(rank)
            return
        del work.waiting[rank]
        now = time.monotonic()
        for other in self._in_work:  # It works on one after the other.
            if rank in other.waiting:
                other.waiting[rank] = now

    def _note(self, work: SlotInWork, rank: int, digests: Sequence[int]) -> None:
        work.digests |= dict(zip(work.hashed.get(rank, ()), digests, strict=True))

    def _hand_over_filled(self) -> None:
        """Those that are filled, in their order: a receiver is sent one tensor after the other."""
        while self._in_work and not self._in_work[0].waiting:
            work = self._in_work.popleft()
            packed = [(self._chunk(work, number), job.asking) for number, (job, *_) in enumerate(work.jobs)]
            fill_number = self._slots.next_fill()
            self._slots.roll.note_fill(work.slot, fill_number)
            self._told, self._given = work, {}
            self._tell(work.slot, packed, fill_number, self._asking)
            self._givers[work.slot] = set(self._given)
            for rank, to in self._given.items():
                self._lead.ranks[rank].link.send(Give(self._lead.round, work.slot, fill_number, tuple(to)))

    def _hand_to(self, peer: Peer, slot: int, chunks: tuple[Chunk, ...], fill: int) -> None:
        assert self._told is not None
        ranks = [self._told.origins.get(chunk.offset, 0) for chunk in chunks]
        origins = tuple(rank if rank and self._direct.reaches(peer, rank) else 0 for rank in ranks)
        peer.hand_over(slot, self._slots.memories[slot], chunks, fill, origins if any(origins) else ())
        parts: dict[int, list[tuple[int, int]]] = {}
        for chunk, rank in zip(chunks, origins, strict=True):
            if rank:
                parts.setdefault(rank, []).append((chunk.offset, chunk.offset + chunk.nbytes))
        for rank, stretches in parts.items():
            self._given.setdefault(rank, []).append((peer.place, tuple(stretches)))

    def _chunk(self, work: SlotInWork, number: int) -> Chunk:
        job, offset, dtype = work.jobs[number]
        digest = work.digests.get(number)
        if self._hashed and digest is None:  # Several ranks filled it.
            digest = digest_of(self._slots.memories[work.slot], offset, job.range.size)
        if not dtype:
            return Chunk(job.tensor, job.range, offset, digest)
        shrunk = self._shrunk(job.tensor, dtype)
        return Chunk(job.tensor, scaled(job.range, shrunk, 1), offset, digest, dtype, shrunk)

    def _check_late(self) -> None:
        now = time.monotonic()
        late = {rank for work in self._in_work for rank, since in work.waiting.items() if now - since > self._timeout}
        if self._checking is not None and now - self._checking > self._timeout:
            late |= {rank.rank for rank in self._lead.unchecked()}
        if late:
            said = [f"rank {rank}: it did not do its part within {self._timeout:g} s" for rank in sorted(late)]
            for rank in late:
                self._lead.part_with(rank)
            raise TransferAborted("the update was aborted", said)
