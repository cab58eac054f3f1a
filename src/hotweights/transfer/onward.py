"""Onward: one version on its way through a relay, from the sender on another host to the workers on this one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from .. import signals
from ..errors import (
    Closed,
    TransferAborted,
    TransferError,
    TransferIncomplete,
    TransferInDoubt,
    TransferTimeout,
    UsageError,
)
from ..manifest import TensorSpec
from ..ranges import within
from ..timeline import Timeline
from .connection import Connection
from .decision import Decision, of_member
from .flow import Waitable
from .keeper import Collected, Keeper
from .losses import dropped, fallen
from .messages import (
    Abort,
    Accept,
    Chunk,
    Commit,
    Crew,
    Done,
    End,
    Filled,
    Message,
    Offer,
    Prepared,
    Refuse,
    Release,
    Seat,
    Wanted,
    reasons_of,
    specs_of,
)
from .outbound import Outbound
from .peers import Peer, PeerGroup
from .registers.register import SharedRecord
from .registers.table import register_of
from .report import SendReport
from .shared_memory import RelaySlots
from .states import SessionState
from .waits import left

SHARE = 0.75
"""Of the patience of whoever offers, for the workers: so it is the worker that is named, and not its relay."""

_FURTHER = 0.9  # of that patience, for relays behind this one: theirs for their workers is a share of it
_LOOK = 1.0  # seconds between two looks at what nobody wakes for


@signals.held_throughout
class Onward(Outbound):
    """One version on its way through a relay: as from a sender, but that bytes and the decision come from elsewhere."""

    _is_relayed = True
    _role = "the relay"

    def __init__(
        self,
        group: PeerGroup,
        members: Sequence[Peer],
        slots: RelaySlots,
        connection: Connection,
        *,
        update: int,
        timeout: float,
        offer: Offer,
        keeper: Keeper | None,
    ) -> None:
        super().__init__(
            group,
            members,
            slots.shared,
            update=update,
            timeout=SHARE * (offer.patience or connection.patience),
            digests=offer.digests,
            drop=offer.drop,
            advance=lambda nbytes: None,
            timeline=Timeline(),
        )
        self._connection = connection
        self._offered = offer
        self._keeper = keeper
        self._collected: Collected | None = None  # what the keeper has of it
        self._longest = connection.patience + timeout
        self._heard: deque[Message] = deque()
        self._passed: set[int] = set()  # slots that some worker holds
        self._voted = False
        self._gone: dict[str, str] = {}  # who was lost that the sender knows, and was not told of, and why
        self._named: tuple[Seat, ...] = ()  # those that vote, as the sender has named them

    def hand_on(self) -> int:
        """Offer, hand on, and do what the sender decides.

        Returns how many workers the sender was told that there are now.

        Raises:
            TransferError: the sender is gone. No worker took the version, if the sender did not say so before.
        """
        offer, began = self._offered, list(self._members)
        for slot in range(len(self._slots.memories)):  # What somebody may still read of the version before.
            self._slots.roll.note_fill(slot, 0)
        try:
            manifest = specs_of(offer)
            if not self._members:
                raise TransferAborted("no worker is here any more")
            if self._keeper is not None:
                self._collected = self._keeper.begin(offer, self._update, manifest)
            # All bytes come to this relay.
            patience = _FURTHER * (offer.patience or self._connection.patience)
            relayed = msgspec.structs.replace(offer, relayed=True, origins=(), patience=patience)
            report = self._run(offer.version, list(manifest.values()), lambda: relayed, self._stream)
        except TransferIncomplete:
            done = self._done("")
        except (TransferAborted, TransferTimeout, TransferInDoubt) as error:
            if not self._end_aborted(error):
                raise
            done = Done("")
        else:
            done = self._done("; ".join(f"{name}: {why}" for name, why in report.problems.items()))
        # The number first: as soon as it is done, the sender counts who is there for the next version.
        there = sum(peer.size for peer in began if peer in self._group.peers and peer.ready)
        self._connection.send(Crew(there))
        self._connection.send(done)
        return there

    def _run(
        self,
        version: str | int,
        offered: Sequence[TensorSpec],
        offer: Callable[[], Offer],
        send: Callable[[], None],
    ) -> SendReport:
        try:
            return super()._run(version, offered, offer, send)
        finally:
            if self._keeper is not None:
                self._keeper.end(self.decided.decision if self.decided else None if self._voted else Decision.ABORT)

    def _done(self, problem: str) -> Done:
        """The host has the version, but for workers that were lost since it voted."""
        return Done(problem, tuple((self._gone | fallen(self._members)).items()))

    def _stream(self) -> None:
        """Ask for what the workers want, and what is kept, and hand on slots as they come."""
        wishes = [(peer, wanted) for peer in self._members for wanted in peer.wanted[: len(peer.names)]]
        names = tuple(name for peer in self._members for name in (peer.names if peer.crew else (peer.name,)))
        wishes += [(peer, wanted) for peer in self._members for wanted in peer.wanted[len(peer.names) :]]
        asked = [wanted for _, wanted in wishes]
        if self._collected is not None:
            asked.append(self._collected.wish(asked))
        try:
            self._connection.send(Accept(asked[0], tuple(asked[1:]), names))
        except UsageError as error:
            raise TransferAborted("the update was aborted", [f"what its workers want: {error}"]) from error
        by_tensor = [(peer, {wanted.tensor: wanted for wanted in wish}) for peer, wish in wishes]
        while not isinstance(message := self._next(), End):
            assert isinstance(message, Filled), "the table lets nothing else pass"
            self._pass(message, by_tensor)
        if self._collected is not None:
            self._collected.check_complete()
        self._named = message.members

    def _own(self, offer: Offer, peer: Peer) -> Offer:
        return offer  # The place is the relay's: its host is one member.

    def _electors(self) -> tuple[Seat, ...]:
        return self._named

    def _pass(self, filled: Filled, wishes: Sequence[tuple[Peer, dict[int, Wanted]]]) -> None:
        """Have workers read a slot. They hold it, and when nobody does any more the sender may fill it again."""
        fill = self._slots.next_fill()
        self._slots.roll.note_fill(filled.slot, fill)
        self._passed.add(filled.slot)
        for peer in dict.fromkeys(peer for peer, _ in wishes):
            own = [wanted for other, wanted in wishes if other is peer]
            chunks = tuple(chunk for chunk in filled.chunks if any(_wants(wanted, chunk) for wanted in own))
            if chunks and peer in self._members:
                peer.hand_over(filled.slot, self._slots.memories[filled.slot], chunks, fill)
                self._nbytes += sum(chunk.nbytes for chunk in chunks)
        if self._collected is not None:  # While the workers read; before the slot can be released.
            self._collected.take(self._slots.memories[filled.slot], filled.chunks)
        self._look()

    def _lose(self, peer: Peer, reason: str) -> None:
        self._gone |= dict.fromkeys(peer.names if peer.crew else (peer.name,), reason)
        super()._lose(peer, reason)

    def _may_go(self, peer: Peer) -> bool:
        """A host takes a version as one. Another one, behind this, may be left out, as the sender leaves out hosts."""
        return self._voted or (self._may_lose and not peer.channel.shares)

    # The decision.

    def _ask(self) -> None:
        """All workers are prepared: the host votes, and hears what the sender decides.

        Raises:
            TransferAborted: to abort.
            TransferInDoubt: the sender is gone, and nobody can tell.
        """
        if (record := self._record) is not None:
            try:
                record.check()
            except UsageError as error:
                raise TransferAborted("the update was aborted", [str(error)]) from error
        # A worker that is lost from here on does not keep the others from what the sender decides.
        self._voted = self._may_lose = True
        self._doubtful = not self._offered.kept
        gone = {name: self._losses.shown(name, reason) for name, reason in self._gone.items()}
        lost, self._gone = gone | dropped(self._members), {}
        self._connection.send(Prepared(tuple(lost.items())))
        try:
            message = self._next()
        except (TransferAborted, TransferInDoubt):
            raise
        except (TransferError, Closed) as error:
            self._read(str(error))
            return
        assert isinstance(message, Commit), "the table lets nothing else pass"

    @property
    def _record(self) -> SharedRecord | None:
        url = self._offered.register
        return SharedRecord(register_of(url), self._update, self._offered.place) if url else None

    def _read(self, reason: str) -> None:
        """Do what is written about this host, now that the sender is lost.

        Raises:
            TransferAborted: it is to abort.
            TransferInDoubt: nothing is, or it cannot be read. Each worker asks the next lead, or goes on trying.
        """
        if self._offered.kept:  # Its group has taken it.
            return
        written, reasons = None, [reason]
        if (record := self._record) is not None:
            try:
                written = Decision.COMMIT if record.is_commit() else Decision.ABORT
            except TransferError as error:
                reasons.append(str(error))
        decision = of_member(voted=True, record=written)
        if decision is None:
            raise TransferInDoubt("the relay lost the sender before it heard the decision", reasons)
        if decision is Decision.ABORT:
            self._doubtful = False
            raise TransferAborted("the update was aborted", reasons)

    def _end_aborted(self, error: TransferError) -> bool:
        """The workers hold the version before; now the sender is told, and may use its slots again.

        Returns whether it heard it. (Raised from here, the error would hold this frame, which holds the error and the
        slots: until Python looks for such circles.)
        """
        if not self._connection.connected:
            return False
        state = self._connection.session.state
        if state in (SessionState.OFFERED, SessionState.STREAMING, SessionState.ENDED):
            self._connection.send(Refuse(reasons_of(error)))
        elif self._voted and state is not SessionState.ABORTED:
            self._connection.drop(str(error))  # A vote cannot be taken back otherwise.
            return False
        deadline = time.monotonic() + self._longest
        while self._connection.session.state is not SessionState.ABORTED:
            if not left(deadline):
                raise TransferTimeout("the sender did not answer in time")
            if self._connection.step() is None:
                self._group.wait((), min(_LOOK, left(deadline)), also=self._connection.awaited())
        return True

    # Waiting.

    def _also(self) -> list[tuple[Waitable, bool]]:
        return [] if self._over else self._connection.awaited()

    def _looked(self) -> None:
        self._release()
        if self._over:
            return
        while (frame := self._connection.step()) is not None:
            if isinstance(frame.message, Abort):
                self._doubtful = frame.message.doubt
                if frame.message.doubt:
                    raise TransferInDoubt("the relay before this one is in doubt", [frame.message.reason])
                raise TransferAborted("the update was aborted", [frame.message.reason])
            self._heard.append(frame.message)

    def _release(self) -> None:
        held = set[int]().union(*(peer.holds for peer in self._members))
        free = tuple(sorted(self._passed - held))
        self._passed &= held
        for slot in free:
            self._slots.roll.note_fill(slot, 0)
        if free and self._connection.connected and self._connection.session.state is SessionState.STREAMING:
            self._connection.send(Release(free))

    def _next(self) -> Message:
        """What the sender says next.

        Raises:
            TransferAborted: that the version was aborted.
            TransferTimeout: nothing, in time.
        """
        deadline, since = time.monotonic() + self._longest, time.monotonic()
        while not self._heard:
            if not left(deadline):
                raise TransferTimeout("the sender said nothing in time")
            late = self._holding(since)
            self._look(min(_LOOK, left(deadline)))
            # After a look, as in ``_wait``.
            for peer in late:
                if not self._heard and peer in self._holding(since):
                    self._lose(peer, f"it did not release a slot within {self._timeout:g} s")
        return self._heard.popleft()

    def _holding(self, since: float) -> list[Peer]:
        """Workers that have kept a slot for too long, where all slots are kept: so the sender waits, and for this host.

        ``since``: when this began to wait for the sender.
        """
        if len(self._passed) < len(self._slots.memories):
            return []
        return [peer for peer in self._members if peer.holds and not left(max(since, peer.moved) + self._timeout)]


def _wants(wanted: dict[int, Wanted], chunk: Chunk) -> bool:
    """Whether a worker wants a chunk. The sender cuts chunks so that each worker wants one wholly or not at all."""
    wish = wanted.get(chunk.tensor)
    if wish is None:
        return False
    return not wish.ranges or any(within(chunk.range, part) is not None for part in wish.ranges)
