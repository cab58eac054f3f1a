"""Pool: a few slots of memory that are used again and again.

Whoever fills a slot leases tensors out of it. The slot goes back to the pool when its last lease has ended *and* every
event given to ``release`` has happened: the end of the lease is the acknowledgement.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import signals
from ..arguments import check_choices, check_count, device_from
from ..errors import Closed, PoolTimeout
from .addresses import PAGE
from .devices import is_host, pinned_empty
from .guards import Guard
from .host import huge_region
from .lease import Slot, fill

_ASK = 0.1  # seconds after which a wait asks its `stop` again, in case nobody calls `wake`
_POLL = 0.001  # seconds; device events have no wait with a deadline, so they are asked again this often


@dataclass(frozen=True, slots=True)
class PoolStats:
    """What a pool did so far.

    Attributes:
        nbytes: its bound: bytes of all slots together.
        slots: how many there are.
        leased: slots that cannot be handed out now; also those that wait for an event only.
        peak: the most that were out at once.
        touched_nbytes: bytes of the slots that were ever used. Only these take memory.
        waited: seconds spent waiting for a slot, all threads together.
    """

    nbytes: int
    slots: int
    leased: int
    peak: int
    touched_nbytes: int
    waited: float


@signals.held_throughout
class Pool:
    """A bounded, reused set of memory slots; thread-safe.

    Memory is mapped at the first ``acquire``: on huge pages, or page-locked when ``device`` is an accelerator. The
    bound is never exceeded. Closing ends every wait; memory of slots that are still held stays valid until the last
    tensor over it is gone.

    Args:
        slots: how many slots.
        slot_nbytes: size of each, in bytes; rounded up to whole pages.
        device: the device that copies out of the slots.
        guard: makes tensors loud that are used after their lease, see ``guards``. A stream may ask for a stricter one.
    """

    def __init__(
        self,
        slots: int = 4,
        slot_nbytes: int = 16 * 1024 * 1024,
        *,
        device: torch.device | str = "cpu",
        guard: Guard = "off",
    ) -> None:
        check_count(1, slots=slots, slot_nbytes=slot_nbytes)
        check_choices(guard=(guard, Guard))
        self.slots = slots
        self.slot_nbytes = -(-slot_nbytes // PAGE) * PAGE
        self.nbytes = slots * self.slot_nbytes
        self.guard: Guard = guard
        self._device = device_from(device) or torch.device("cpu")
        self._changed = threading.Condition()
        # Everything below changes under the lock only.
        self._all: list[Slot] = []
        self._free: list[Slot] = []  # Last in, first out: a small load touches one slot, and it stays in the caches.
        self._used = 0  # Slots 0.._used-1 were handed out at least once.
        self._peak = 0
        self._waited = 0.0
        self._closed = False

    def acquire(self, holder: str, *, timeout: float = 60.0, stop: Callable[[], bool] = bool) -> Slot:
        """A free slot, held for ``holder`` until ``Slot.release``. Blocks while there is none.

        Args:
            holder: who will hold it; others who wait in vain are told.
            timeout: seconds to wait at most.
            stop: asked again and again; when it says true the wait ends. Call ``wake`` to have it asked now.

        Raises:
            PoolTimeout: no slot in time; names the holders.
            Closed: the pool was closed, or ``stop`` said true, before or during the wait.
        """
        began = time.monotonic()
        with self._changed:
            self._map()
            while True:
                if self._closed or stop():
                    closed = "pool" if self._closed else "stream"
                    raise Closed(f"the wait of {holder!r} for a slot ended: the {closed} was closed")
                slot = self._ready()
                if slot is not None:
                    break
                left = timeout - (time.monotonic() - began)
                if left <= 0:
                    raise PoolTimeout(self._complaint(holder, timeout))
                self._changed.wait(min(left, _POLL if self._free else _ASK))
                signals.deliver()
            self._waited += time.monotonic() - began
            slot.holder, slot.claims = holder, 1
            late, slot.poison = slot.poison, []
            self._peak = max(self._peak, self._used - len(self._free))
        for poison in late:
            fill(slot.memory, poison)
        return slot

    def wake(self) -> None:
        """Make every waiting ``acquire`` look at its ``stop`` again."""
        with self._changed:
            self._changed.notify_all()

    def stats(self) -> PoolStats:
        """A snapshot of what the pool did so far."""
        with self._changed:
            leased = self._used - sum(1 for slot in self._free if slot.is_ready())
            return PoolStats(self.nbytes, self.slots, leased, self._peak, self._used * self.slot_nbytes, self._waited)

    def close(self) -> None:
        """End every wait and let go of the memory. May be called twice."""
        with self._changed:
            self._closed = True
            self._free.clear()
            self._all.clear()
            self._changed.notify_all()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        stats = self.stats()
        return f"<Pool {self.slots} x {self.slot_nbytes / 2**20:g} MiB: {stats.leased} leased, peak {stats.peak}>"

    def _map(self) -> None:
        if self._all or self._closed:
            return
        region = pinned_empty(self.nbytes) if not is_host(self._device) else huge_region(self.nbytes)
        self._all = [
            Slot(piece, guard=self.guard, lock=self._changed, give_back=self._give_back)
            for piece in torch.split(region, self.slot_nbytes)
        ]

    def _ready(self) -> Slot | None:
        for index in range(len(self._free) - 1, -1, -1):
            if self._free[index].is_ready():
                slot = self._free.pop(index)
                slot.pending.clear()
                return slot
        if self._used < self.slots:
            self._used += 1
            return self._all[self._used - 1]
        return None

    def _give_back(self, slot: Slot) -> None:
        if not self._closed:
            self._free.append(slot)
            self._changed.notify_all()

    def _complaint(self, holder: str, timeout: float) -> str:
        waiting = {id(slot) for slot in self._free}
        held = [
            f"{slot.holder!r}{' (its device copy has not finished)' if id(slot) in waiting else ''}"
            for slot in self._all
        ]
        return (
            f"{holder!r} waited {timeout:g} s for one of {self.slots} slots of {self.slot_nbytes} bytes; "
            f"held by: {', '.join(held)}. End those leases, or give the pool more slots"
        )
