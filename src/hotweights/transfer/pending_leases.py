"""PendingLeases: leases that have ended while a device may still read their memory; it is given back after that."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import TransferError, TransferTimeout
from ..memory.devices import POLL, wait
from ..memory.guards import poison_byte
from ..memory.host import host_empty
from ..memory.lease import Lease
from .connection import Connection
from .messages import Release
from .states import SessionState


class PrivateMemory:
    """Memory of a receiver's own for one tensor at a time, used again and again. Grows to the largest."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> torch.Tensor:
        """``uint8 [nbytes]``, until the next call."""
        if self._memory.numel() < nbytes:
            self._memory = host_empty((nbytes,), torch.uint8)
        return self._memory[:nbytes]


class PendingLeases:
    """The leases of one version: those in slots, which are the sender's, and the last one in private memory."""

    def __init__(self, connection: Connection, private: PrivateMemory, timeout: float) -> None:
        self._connection = connection
        self._private = private
        self._timeout = timeout
        self._in_slots: list[tuple[int, int, list[Lease]]] = []  # slot, fill, and what lies there
        self._in_private: Lease | None = None

    def return_slot(self, slot: int, fill: int, leases: list[Lease]) -> None:
        """Give a slot back to the sender, once nothing reads these leases, which lie in it.

        Raises:
            TransferError: as ``give_back``.
        """
        self._in_slots.append((slot, fill, leases))
        # Each release wakes the sender: half of the slots at once keep it busy as well, and wake it less often.
        if 2 * len(self._in_slots) >= len(self._connection.slots.memories):
            self.give_back()

    def give_back(self) -> float:
        """Release the slots that nothing reads any more. Returns the seconds after which to call again, or 0.

        Raises:
            TransferError: one was filled again while it was read: the sender had given this receiver up.
        """
        pending = [(slot, fill, leases) for slot, fill, leases in self._in_slots if any(map(Lease.pending, leases))]
        read = {slot for slot, *_ in pending}
        free = tuple(slot for slot, *_ in self._in_slots if slot not in read)
        state = self._connection.session.state if free and self._connection.connected else None
        if state in (SessionState.STREAMING, SessionState.ENDED):  # Who has refused holds no slots any more.
            self._check(free)
        if state is SessionState.STREAMING:
            self._connection.send(Release(free))
        self._in_slots = pending
        return POLL if pending else 0.0

    def _check(self, free: tuple[int, ...]) -> None:
        """Whoever reads a slot asks last what it bears: that it was right before says nothing about the bytes."""
        slots = self._connection.slots
        if not all(slots.bears(slot, fill) for slot, fill, _ in self._in_slots if slot in free):
            self._in_slots.clear()
            raise TransferError(
                "the sender has given this receiver up, and filled a slot again that was still read; "
                "Sender(..., timeout=...) waits longer"
            )

    def private(self, nbytes: int) -> torch.Tensor:
        """The private memory, ``uint8 [nbytes]``, when nothing reads the tensor before in it."""
        if self._in_private is not None:
            self._wait(lambda: not self._is_pending())
            self.free_private()
        return self._private.take(nbytes)

    def lend_private(self, lease: Lease) -> None:
        """Note the lease that lies in the private memory from now on."""
        self._in_private = lease

    def free_private(self) -> None:
        """Poison the private memory under a guard, unless its lease is still read."""
        lease = self._in_private
        if lease is None or lease.pending():
            return
        self._in_private = None
        if lease.guard != "off":
            self._private.take(lease.spec.nbytes).fill_(poison_byte(lease.spec.dtype))

    def settle(self) -> None:
        """Wait until nothing is read any more, and give everything back.

        Raises:
            TransferTimeout: a device did not finish.
            Closed: the receiver was closed meanwhile.
        """
        self._wait(lambda: not self._is_pending())
        self.free_private()
        self._wait(lambda: not self.give_back())

    def forget(self) -> None:
        """The version is over, and its slots are not this receiver's any more."""
        self._in_slots.clear()
        self._in_private = None

    def _is_pending(self) -> bool:
        return self._in_private is not None and self._in_private.pending()

    def _wait(self, happened: Callable[[], bool]) -> None:
        if not wait(happened, self._timeout, lambda: self._connection.stopped):
            self._connection.check_open()
            raise TransferTimeout(f"a device did not finish its copy within {self._timeout:g} s")
