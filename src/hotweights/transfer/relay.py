"""Relay: takes what comes from another host, once, and hands it to the workers on this one, in shared memory."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence

import msgspec

from .. import signals
from ..arguments import check_flags, check_seconds
from ..errors import (
    Closed,
    PeerLost,
    ProtocolError,
    TransferAborted,
    TransferError,
    TransferIncomplete,
    TransferInDoubt,
    TransferTimeout,
    UsageError,
)
from ..notices import log
from ..ranges import within
from ..timeline import Timeline
from .connection import Connection
from .decision import Decision, of_member
from .doubts import forward, is_in_doubt, past_of
from .endpoint import endpoints_of, is_local, origin_of
from .flow import Waitable
from .messages import (
    Abort,
    Accept,
    Chunk,
    Commit,
    Crew,
    Done,
    End,
    Filled,
    Frame,
    Message,
    Offer,
    Past,
    Prepared,
    Refuse,
    Release,
    Seat,
    Verdict,
    Wanted,
    reasons_of,
    specs_of,
)
from .outbound import Outbound
from .peers import Peer, PeerGroup
from .register import SharedRecord
from .register_table import register_of
from .shared_memory import RelaySlots
from .states import SessionState
from .waits import left

_LOOK = 1.0  # seconds between two looks at what nobody wakes for
_RETRY = 0.1  # seconds until the next try, where the sender is gone
_SHARE = 0.75  # of the sender's patience, for the workers: so it is the worker that is named, and not its relay


class Relay:
    """One for each host: every byte crosses the network once, however many workers want it. A context manager.

    Its workers are receivers at ``to``, and take part in the sender's decision as if they were connected to it. If one
    of them fails, the whole host does not take the version. A relay that dies takes its host out, as a lost worker
    would; its workers connect to the next one at the same address.
    """

    def __init__(
        self,
        source: str,
        to: str | Sequence[str],
        *,
        keys: str | os.PathLike[str] | None = None,
        insecure: bool = False,
        name: str = "relay",
        timeout: float = 60.0,
        retry_refused: bool = True,
    ) -> None:
        """Nothing is connected yet.

        Args:
            source: the sender's address, or that of a relay before this one, ``tcps://HOST:PORT``.
            to: where workers connect, ``unix:PATH``; or several addresses, for other relays too.
            keys: as of ``Receiver``.
            insecure: as of ``Receiver``.
            name: for people.
            timeout: seconds that each single wait for the sender may take, beyond the sender's own patience.
            retry_refused: whether a sender that does not take this relay, as one of another job, is tried again. If
                not, ``run`` raises what it said.
        """
        check_seconds(timeout=timeout)
        check_flags(retry_refused=retry_refused)
        self._retry_refused = retry_refused
        if is_local(source):
            raise UsageError(f"a relay is for what comes from another host; workers on this one connect to {source}")
        self.source = source
        listed = [to] if isinstance(to, str) else list(to)
        if all(map(is_local, listed)):  # The keys are for the sender.
            self._doors = endpoints_of(listed)
        else:
            self._doors = endpoints_of(listed, keys=keys, insecure=insecure)
        self._timeout = timeout
        self._made: list[RelaySlots] = []  # of the connection that there is
        self._connection = Connection(
            origin_of(source, keys=keys, insecure=insecure), name, crew=0, slots=self._make_slots
        )
        self._group: PeerGroup | None = None
        self._closed = False
        self._running = threading.Lock()  # held by ``run``

    def run(self) -> None:
        """Hand on versions until ``close``. A sender that is gone is waited for, and workers wait with it.

        Raises:
            UsageError: workers cannot connect at ``to``.
            ProtocolError: with ``retry_refused=False``: the sender does not take this relay.
        """
        with self._running:
            self._run()

    @signals.watched
    def _run(self) -> None:
        last = ""
        while not self._closed:
            try:
                try:
                    self._serve()
                finally:
                    self._let_go()
            except Closed:
                return
            except TransferError as error:
                if isinstance(error, ProtocolError) and not self._retry_refused:
                    raise
                if str(error) != last:  # A sender that is not there yet is tried again and again.
                    last = str(error)
                    log(logging.WARNING, "relay from %s: %s", self.source, last)
                self._pause(_RETRY if isinstance(error, PeerLost) else _LOOK)

    @signals.held
    def _pause(self, seconds: float) -> None:
        """Before the next try."""
        with contextlib.suppress(Closed):
            self._connection.rest(seconds)

    def close(self) -> None:
        """End every wait. May be called twice, and by any thread; ``run`` lets go and returns."""
        self._closed = True
        self._connection.stop()
        if (group := self._group) is not None:
            group.stop()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
        with self._running:
            self._connection.close()

    def __repr__(self) -> str:
        return f"<Relay from {self.source}: {0 if self._group is None else len(self._group.peers)} workers>"

    @signals.held
    def _serve(self) -> None:
        """One connection to a sender, to its end."""
        connection, said, told = self._connection, 0, Past(0, ())
        while not connection.greet():
            connection.rest()
        slots = self._made[0].shared
        # Workers may have to wait while the sender waits for other hosts.
        group = self._group = PeerGroup(self._doors, slots, connection.patience + self._timeout, connection.carrier)
        while True:
            self._connection.check_open()
            workers = group.connected()
            if (
                past := past_of(workers)
            ) != told:  # Before the number of workers: nothing is offered to a relay without any.
                connection.send(past)
                told = past
            if (count := sum(peer.size for peer in workers)) != said:
                connection.send(Crew(count))
                said = count
            if (frame := connection.step()) is not None:
                if isinstance(frame.message, Verdict):
                    forward(workers, frame.message)
                    told = past_of(workers)  # Another worker may have the same to tell: it was not answered yet.
                    continue
                # Who came after the sender had asked is in doubt still, and takes part in nothing.
                workers = [peer for peer in workers if not is_in_doubt(peer)]
                self._hand_on(group, workers, frame)
                continue
            group.wait(group.peers, _LOOK, listen=True, also=connection.awaited())

    @signals.held
    def _hand_on(self, group: PeerGroup, workers: list[Peer], frame: Frame) -> None:
        if not isinstance(frame.message, Offer):
            raise ProtocolError("something else than an offer came")
        Onward(
            group,
            workers,
            self._made[0],
            self._connection,
            update=frame.update,
            timeout=self._timeout,
            offer=frame.message,
        ).hand_on()

    def _make_slots(self, *what: object) -> RelaySlots:
        self._made.append(RelaySlots(*what))  # type: ignore[arg-type]
        return self._made[0]

    @signals.held
    def _let_go(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()
        self._connection.drop("the relay ends")
        for made in self._made:
            made.shared.close()
        self._made.clear()


@signals.held_throughout
class Onward(Outbound):
    """One version on its way through a relay: as from a sender, but that bytes and the decision come from elsewhere."""

    _is_relayed = True

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
    ) -> None:
        super().__init__(
            group,
            members,
            slots.shared,
            update=update,
            timeout=_SHARE * connection.patience,
            digests=offer.digests,
            drop=False,
            advance=lambda nbytes: None,
            timeline=Timeline(),
        )
        self._connection = connection
        self._offered = offer
        self._longest = connection.patience + timeout
        self._heard: deque[Message] = deque()
        self._passed: set[int] = set()  # slots that some worker holds
        self._voted = False
        self._named: tuple[Seat, ...] = ()  # those that vote, as the sender has named them

    def hand_on(self) -> None:
        """Offer, hand on, and do what the sender decides.

        Raises:
            TransferError: the sender is gone. No worker took the version, if the sender did not say so before.
        """
        offer = self._offered
        for slot in range(len(self._slots.memories)):  # What somebody may still read of the version before.
            self._slots.roll.note_fill(slot, 0)
        try:
            manifest = list(specs_of(offer).values())
            if not self._members:
                raise TransferAborted("no worker is here any more")
            relayed = msgspec.structs.replace(offer, relayed=True, origins=())  # All bytes come to this relay.
            report = self._run(offer.version, manifest, lambda: relayed, self._stream)
        except TransferIncomplete:
            self._done("")
        except (TransferAborted, TransferTimeout, TransferInDoubt) as error:
            self._end_aborted(error)
        else:
            self._done("; ".join(f"{name}: {why}" for name, why in report.problems.items()))
        finally:
            self._ballot.close()

    def _done(self, problem: str) -> None:
        """The host has the version, but for workers that were lost since it voted."""
        fallen = {f"{name} on {peer.channel.host}": why for peer in self._members for name, why in peer.fallen}
        self._connection.send(Done(problem, tuple((self._lost | fallen).items())))

    def _stream(self) -> None:
        """Ask for what the workers want, and hand on slots as they come."""
        members = [peer for peer in self._members for _ in peer.wanted]
        wishes = [wanted for peer in self._members for wanted in peer.wanted]
        names = tuple(name for peer in self._members for name in (peer.names if peer.crew else (peer.name,)))
        self._connection.send(Accept(wishes[0], tuple(wishes[1:]), names))
        by_tensor = [{wanted.tensor: wanted for wanted in wish} for wish in wishes]
        while not isinstance(message := self._next(), End):
            assert isinstance(message, Filled), "the table lets nothing else pass"
            self._pass(message, list(zip(members, by_tensor, strict=True)))
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
        self._look()

    # The decision.

    def _ask(self) -> None:
        """All workers are prepared: the host votes, and hears what the sender decides.

        Raises:
            TransferAborted: to abort.
            TransferInDoubt: the sender is gone, and nobody can tell.
        """
        # A worker that is lost from here on does not keep the others from what the sender decides.
        self._voted = self._doubtful = self._may_lose = True
        self._connection.send(Prepared())
        try:
            message = self._next()
        except (TransferAborted, TransferInDoubt):
            raise
        except (TransferError, Closed) as error:
            self._read(str(error))
            return
        assert isinstance(message, Commit), "the table lets nothing else pass"

    def _read(self, reason: str) -> None:
        """Do what is written about this host, now that the sender is lost.

        Raises:
            TransferAborted: it is to abort.
            TransferInDoubt: nothing is, or it cannot be read. Each worker asks the next lead, or goes on trying.
        """
        written, reasons = None, [reason]
        if self._offered.register:
            try:
                record = SharedRecord(register_of(self._offered.register), self._update, self._offered.place)
                written = Decision.COMMIT if record.is_commit() else Decision.ABORT
            except TransferError as error:
                reasons.append(str(error))
        decision = of_member(voted=True, record=written)
        if decision is None:
            raise TransferInDoubt("the relay lost the sender before it heard the decision", reasons)
        if decision is Decision.ABORT:
            self._doubtful = False
            raise TransferAborted("the update was aborted", reasons)

    def _end_aborted(self, error: TransferError) -> None:
        """The workers hold the version before; now the sender is told, and may use its slots again."""
        if not self._connection.connected:
            raise error
        state = self._connection.session.state
        if state in (SessionState.OFFERED, SessionState.STREAMING, SessionState.ENDED):
            self._connection.send(Refuse(reasons_of(error)))
        elif self._voted and state is not SessionState.ABORTED:
            self._connection.drop(str(error))  # A vote cannot be taken back otherwise.
            raise error
        deadline = time.monotonic() + self._longest
        while self._connection.session.state is not SessionState.ABORTED:
            if not left(deadline):
                raise TransferTimeout("the sender did not answer in time")
            if self._connection.step() is None:
                self._group.wait((), min(_LOOK, left(deadline)), also=self._connection.awaited())
        self._connection.send(Done(""))

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
        deadline = time.monotonic() + self._longest
        while not self._heard:
            if not left(deadline):
                raise TransferTimeout("the sender said nothing in time")
            self._look(min(_LOOK, left(deadline)))
        return self._heard.popleft()


def _wants(wanted: dict[int, Wanted], chunk: Chunk) -> bool:
    """Whether a worker wants a chunk. The sender cuts chunks so that each worker wants one wholly or not at all."""
    wish = wanted.get(chunk.tensor)
    if wish is None:
        return False
    return not wish.ranges or any(within(chunk.range, part) is not None for part in wish.ranges)
