"""Audience: the receivers that connect to a sender, and what they are told of each version until all have decided."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from .. import signals
from ..errors import TransferError
from ..failure import failure_report
from ..progress import progress
from ..timeline import Timeline
from .door import Endpoint
from .doubts import Decided, tell
from .network import NetworkDoor
from .outbound import Outbound
from .peers import Beside, Peer, PeerGroup
from .registers.register import Register
from .report import WAIT, SendReport
from .shared_memory import WriteSlots
from .waits import left

_REMEMBERED = 16  # updates whose decision is kept

_Outbound = TypeVar("_Outbound", bound=Outbound)


@signals.held_throughout
class Audience:
    """Whoever connects to one sender. One thread uses it; any may ``stop`` it. Owns sockets and slots; close it.

    Attributes:
        address: where it listens.
        slots: what is sent lies there on its way.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        slots: int,
        slot_nbytes: int,
        receivers: int,
        timeout: float,
        digests: bool,
        drop: bool,
        carrier: str,
        register: Register | None,
        beside: Beside | None = None,
    ) -> None:
        """Listen.

        Args:
            endpoints: where.
            slots: pieces of shared memory. With ``beside`` their owner seals them, when others have mapped them.
            slot_nbytes: bytes of each.
            receivers: how many must be there before anything is sent.
            timeout: seconds that each single wait may take.
            digests: whether receivers compare what they copied.
            drop: whether an update goes on without receivers that were lost.
            carrier: what brings bytes to receivers on other hosts.
            register: where decisions are written.
            beside: who is heard while receivers are waited for.

        Raises:
            TransferError: there is no memory for the slots.
            AddressTaken: another sender is there.
            UsageError: nobody can listen there.
        """
        self.slots = WriteSlots(slots, slot_nbytes, sealed=beside is None)
        self._receivers, self._timeout, self._digests, self._drop = receivers, timeout, digests, drop
        self._register, self._beside = register, beside
        try:
            self._group = PeerGroup(endpoints, self.slots, timeout, carrier)
        except BaseException:
            self.slots.close()
            raise
        self.address = ", ".join(self._group.addresses)
        # Random, so that a late message of a sender that was here before is not taken for one of this sender's.
        # Receivers take the first id that they see, and after that only larger ones.
        self._update = secrets.randbits(62)
        self._epoch = 0  # before the first version
        self._decided: dict[int, Decided] = {}  # by update, of the last ones

    @property
    def state(self) -> str:
        """How many there are, in words."""
        return f"{len(self._group.peers)} receivers"

    @property
    def doors(self) -> list[NetworkDoor]:
        """Where other hosts come in."""
        return [door for door in self._group.doors if isinstance(door, NetworkDoor)]

    def admit(self) -> None:
        """Let in who waits, before ``slots`` are sealed: receivers are greeted after that."""
        self._group.admit()

    def connected(self) -> tuple[str, ...]:
        """Who is there now, by name; a relay once for each of its workers. Never waits."""
        connected = self._group.connected()
        self._tell(connected)
        return tuple(peer.name for peer in connected for _ in range(peer.size))

    def offer(
        self,
        kind: Callable[..., _Outbound],
        run: Callable[[_Outbound], SendReport],
        *,
        version: str | int,
        nbytes: int,
        receivers: int | None,
        show_progress: bool | None,
    ) -> SendReport:
        """Wait for receivers, and run an update for them.

        Args:
            kind: the class of the update.
            run: what runs it.
            version: its name.
            nbytes: of all that may be sent, for the progress bar.
            receivers: how many must be there; ``None`` is as many as always.
            show_progress: whether to draw a progress bar.

        Raises:
            TransferTimeout: too few receivers came.
            Exception: what ``run`` raises.
        """
        timeline = Timeline()
        try:
            return self._offer(timeline, kind, run, nbytes, receivers, show_progress)
        except TransferError as error:
            error.report = failure_report(timeline, "send", version)
            raise

    def _offer(
        self,
        timeline: Timeline,
        kind: Callable[..., _Outbound],
        run: Callable[[_Outbound], SendReport],
        nbytes: int,
        receivers: int | None,
        show_progress: bool | None,
    ) -> SendReport:
        with timeline.event(WAIT):
            count = self._receivers if receivers is None else receivers
            self._group.gather(count, drop=self._drop, meanwhile=self._tell, beside=self._beside)
            doubts = self._settle()
            members = self._group.gather(count, drop=self._drop, beside=self._beside)
        # Larger than that of any lead that somebody here has had.
        self._epoch = max(self._epoch, 1, *(peer.epoch + (peer.epoch > self._epoch) for peer in members))
        self._update += 1
        with progress("sending", nbytes, show=show_progress) as advance:
            outbound = kind(
                self._group,
                members,
                self.slots,
                update=self._update,
                timeout=self._timeout,
                digests=self._digests,
                drop=self._drop,
                needed=count,
                register=self._register,
                epoch=self._epoch,
                advance=advance,
                timeline=timeline,
            )
            try:
                report = run(outbound)
            finally:
                outbound.close()
                self._remember(outbound)
        return replace(report, warnings=(*doubts, *report.warnings))

    def stop(self) -> None:
        """End every wait. Any thread may call it."""
        self._group.stop()

    def close(self) -> None:
        """Let go of the address and the memory. May be called twice."""
        self._group.close()
        self.slots.close()

    def _settle(self) -> tuple[str, ...]:
        """Say to those in doubt about an update what became of it, when somebody who knows is there.

        Returns warnings about those updates of which nobody knows it.
        """
        deadline = time.monotonic() + self._timeout
        while True:
            late = not left(deadline)
            still = tell(self._group.connected(), self._decided, last=late)
            if late or not still:
                return tuple(f"nobody knows whether it was taken: {doubt}" for doubt in still)
            self._group.listen(left(deadline), self._beside)

    def _tell(self, ready: list[Peer]) -> None:
        tell(ready, self._decided)

    def _remember(self, outbound: Outbound) -> None:
        """For who comes back in doubt."""
        if outbound.decided is not None:
            self._decided[self._update] = outbound.decided
        while len(self._decided) > _REMEMBERED:
            del self._decided[min(self._decided)]
