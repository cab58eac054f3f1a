"""Relay: takes what comes from another host, once, and hands it to the workers on this one, in shared memory."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Sequence

from .. import signals
from ..arguments import check_flags, check_seconds, nbytes_from
from ..errors import Closed, PeerLost, ProtocolError, TransferError, UsageError
from ..notices import log
from ..text import size
from .connection import Connection
from .doubts import forward, is_in_doubt, past_of
from .endpoint import check_connectable, check_known, endpoints_of, is_local, origin_of
from .handout import Handout
from .keeper import Keeper, lacks
from .messages import Crew, Frame, Offer, Past, Verdict
from .onward import Onward
from .peers import Peer, PeerGroup
from .shared_memory import RelaySlots, WriteSlots

_LOOK = 1.0  # seconds between two looks at what nobody wakes for
_RETRY = 0.1  # seconds until the next try, where the sender is gone


class Relay:
    """One for each host: every byte crosses the network once, however many workers want it. A context manager.

    Its workers are receivers at ``to``, and take part in the sender's decision as if they were connected to it. If one
    of them fails, the whole host does not take the version. A relay that dies takes its host out, as a lost worker
    would; its workers connect to the next one at the same address.

    With ``keep`` it has the last version that its host has taken, and gives it to workers that come between two.
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
        keep: int | str | None = None,
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
            keep: bytes of memory, or such as ``"40GB"``, in which versions are kept for workers that come later. All
                of a version comes to this host then, whatever its workers want of it. Where two do not fit, nothing is
                kept while the next one comes; one that does not fit is not kept, which is logged.
        """
        check_seconds(timeout=timeout)
        check_flags(retry_refused=retry_refused)
        self._retry_refused = retry_refused
        self._keeper = None if keep is None else Keeper(nbytes_from(keep=keep))
        if is_local(source):
            raise UsageError(f"a relay is for what comes from another host; workers on this one connect to {source}")
        check_connectable(source)
        self.source = source
        check_known(to)
        listed = [to] if isinstance(to, str) else list(to)
        if source in listed:
            raise UsageError(f"a relay takes from one address and gives at another; found {source} as both")
        if all(map(is_local, listed)):  # The keys are for the sender.
            self._doors = endpoints_of(listed)
        else:
            self._doors = endpoints_of(listed, keys=keys, insecure=insecure)
        self._timeout = timeout
        self._made: list[RelaySlots] = []  # of the connection that there is
        self._size = 0, 0  # how many there were last, and bytes of each
        self._own: list[WriteSlots] = []  # without a sender
        self._told = ""  # why the sender is not there, as it was logged last
        self._connection = Connection(
            origin_of(source, keys=keys, insecure=insecure), name, crew=0, slots=self._make_slots
        )
        self._group: PeerGroup | None = None
        self._closed = False
        self._free = False  # whether ``to`` was seen to be
        self._running = threading.Lock()  # held by ``run``

    def run(self) -> None:
        """Hand on versions until ``close``. A sender that is gone is waited for, and workers wait with it.

        Raises:
            UsageError: workers cannot connect at ``to``.
            ProtocolError: with ``retry_refused=False``: the sender does not take this relay.
        """
        with self._running:
            self._run()

    @property
    def kept(self) -> str | int | None:
        """The name of the version that it keeps, and gives to workers that come now; ``None`` if there is none."""
        kept = None if self._keeper is None else self._keeper.kept
        return None if kept is None else kept.version

    @property
    def kept_nbytes(self) -> int:
        """Bytes of memory that it has for versions now: the one that is kept, and what comes or came before."""
        return 0 if self._keeper is None else self._keeper.nbytes

    @signals.watched
    def _run(self) -> None:
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
                self._pause(self._tell(error))

    def _tell(self, error: TransferError) -> float:
        """Log what is new of it: a sender that is not there yet is tried again and again. Returns how soon."""
        if str(error) != self._told:
            self._told = str(error)
            log(logging.WARNING, "relay from %s: %s", self.source, self._told)
        return _RETRY if isinstance(error, PeerLost) else _LOOK

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
        kept = "" if self.kept is None else f", keeps version {self.kept!r}, {size(self.kept_nbytes)}"
        return f"<Relay from {self.source}: {0 if self._group is None else len(self._group.peers)} workers{kept}>"

    @signals.held
    def _serve(self) -> None:
        """One connection to a sender, to its end."""
        connection, said, told = self._connection, 0, Past(0, ())
        self._check_free()
        self._meet()
        # Workers may have to wait while the sender waits for other hosts.
        group = self._group = self._listening(self._made[0].shared)
        while True:
            self._connection.check_open()
            workers = group.connected()
            # Before the number of workers: nothing is offered to a relay without any.
            if (past := self._past(workers)) != told:
                connection.send(past)
                told = past
            late = self._late(workers)
            # Who is late is no member yet: it would be given two versions at once.
            if (count := sum(peer.size for peer in workers if peer not in late)) != said:
                connection.send(Crew(count))
                said = count
            if (frame := connection.step()) is not None:
                if isinstance(frame.message, Verdict):
                    self._forward(workers, frame.message)
                    told = self._past(workers)  # Another worker may have the same to tell: it was not answered yet.
                else:
                    said = self._hand_on(group, workers, frame)
            elif late:
                self._give(group, self._made[0].shared, late)
            else:
                group.wait(group.peers, _LOOK, listen=True, also=connection.awaited())

    def _check_free(self) -> None:
        """See that workers can connect at ``to``, once: else it would show only when a sender is there.

        Raises:
            AddressTaken: somebody else listens there.
            UsageError: nobody can.
        """
        if not self._free:
            for endpoint in self._doors:
                endpoint.listen().close()
            self._free = True

    def _listening(self, slots: WriteSlots) -> PeerGroup:
        connection = self._connection
        return PeerGroup(self._doors, slots, connection.patience + self._timeout, connection.carrier)

    def _meet(self) -> None:
        """Connect to the sender. While it is not there, workers that come are given what is kept."""
        while (seconds := self._greet()) is not None:
            if self._group is None and self.kept is not None:
                self._own.append(WriteSlots(*self._size))
                self._group = self._listening(self._own[0])
            if (group := self._group) is None:
                self._connection.rest()
            elif late := self._late(group.connected()):
                self._give(group, self._own[0], late)
            else:
                group.wait(group.peers, seconds, listen=True, also=self._connection.awaited())
        self._dismiss()  # They connect again.

    def _greet(self) -> float | None:
        """Connect to the sender, and return ``None``; if it is not there, seconds until the next try."""
        try:
            return None if self._connection.greet() else _RETRY
        except TransferError as error:
            if self.kept is None or (isinstance(error, ProtocolError) and not self._retry_refused):
                raise
            return self._tell(error)

    def _past(self, workers: Sequence[Peer]) -> Past:
        """What workers know, and that the group has taken what is kept."""
        past = past_of(workers)
        if self._keeper is None or (kept := self._keeper.kept) is None:
            return past
        # Who was given it listens to no sender of a smaller epoch.
        return Past(max(past.epoch, kept.epoch), (*past.accounts, kept.account))

    def _late(self, workers: Sequence[Peer]) -> list[Peer]:
        return [] if self._keeper is None else self._keeper.late(_undoubting(workers))

    @signals.held
    def _give(self, group: PeerGroup, slots: WriteSlots, late: list[Peer]) -> None:
        assert self._keeper is not None
        assert self._keeper.kept is not None
        with contextlib.closing(Handout(group, late, slots, self._keeper.kept, connection=self._connection)) as handout:
            handout.give()

    def _forward(self, workers: Sequence[Peer], verdict: Verdict) -> None:
        forward(workers, verdict)
        if self._keeper is not None:
            self._keeper.settle(verdict.about, verdict.decision)

    @signals.held
    def _hand_on(self, group: PeerGroup, workers: list[Peer], frame: Frame) -> int:
        offer = frame.message
        if not isinstance(offer, Offer):
            raise ProtocolError("something else than an offer came")
        # Who came after the sender had asked is in doubt still, and takes part in nothing.
        members = _undoubting(workers)
        if offer.kept:
            members = [peer for peer in members if lacks(peer, offer.kept, offer.epoch)]
        onward = Onward(
            group,
            members,
            self._made[0],
            self._connection,
            update=frame.update,
            timeout=self._timeout,
            offer=offer,
            keeper=self._keeper,
        )
        with contextlib.closing(onward):
            return onward.hand_on()

    def _make_slots(self, *what: object) -> RelaySlots:
        self._made.append(RelaySlots(*what))  # type: ignore[arg-type]
        shared = self._made[0].shared
        self._size = len(shared.memories), shared.slot_nbytes
        return self._made[0]

    @signals.held
    def _let_go(self) -> None:
        self._dismiss()
        self._connection.drop("the relay ends")
        for made in self._made:
            made.shared.close()
        self._made.clear()

    def _dismiss(self) -> None:
        """End the workers' connections, and close what they read."""
        group, self._group = self._group, None
        if group is not None:
            group.close()
        for slots in self._own:
            slots.close()
        self._own.clear()


def _undoubting(workers: Sequence[Peer]) -> list[Peer]:
    return [peer for peer in workers if not is_in_doubt(peer)]
