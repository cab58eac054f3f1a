"""Pool, Slot and Lease. The only file that hands out memory; it never reads a checkpoint.

A ``Pool`` owns a few slots of memory and never more. Whoever fills a slot leases tensors out of it;
the slot goes back to the pool when its last lease has ended *and* every event given to ``release`` has
happened. So the end of the lease is the acknowledgement.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch

from .devices import Event, is_host, pinned_empty
from .errors import Closed, PoolTimeout, UnsupportedDtype, UsageError
from .guards import Guard, TrapTensor, Tripwire, check_guard, poison_byte
from .manifest import OpaqueDtype, TensorSpec

__all__ = ["ALIGNMENT", "HUGE_PAGE", "Lease", "Pool", "PoolStats", "Slot", "advise_huge_pages", "buffer", "host_empty"]

ALIGNMENT = 64  # bytes; a cache line, and enough for every dtype
HUGE_PAGE = 2 * 1024 * 1024
PAGE = mmap.PAGESIZE
_ASK = 0.1  # seconds after which a wait asks its `stop` again, for those who forget to `wake`
_POLL = 0.001  # seconds; device events have no wait with a deadline, so they are asked again this often

_libc = ctypes.CDLL(None, use_errno=True)
_MADV_HUGEPAGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only


def buffer(address: int, nbytes: int) -> ctypes.Array[ctypes.c_char]:
    """A writable buffer over memory that somebody else owns. The caller keeps the owner alive while using it."""
    return (ctypes.c_char * nbytes).from_address(address)


def advise_huge_pages(tensor: torch.Tensor) -> None:
    """Ask for huge pages under a host tensor that may not have been touched yet. Only advice: it cannot fail.

    Faulting in 4 KiB pages costs about seven times what copying into them does.
    """
    start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    stop = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
    if _MADV_HUGEPAGE is not None and stop - start >= HUGE_PAGE:
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), ctypes.c_int(_MADV_HUGEPAGE))


def host_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised contiguous host memory, on huge pages where it is large. The caller's alone."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")  # Not the default one: the caller's code may have set it.
    if tensor.nbytes >= 2 * HUGE_PAGE:
        advise_huge_pages(tensor)
    return tensor


@dataclass(frozen=True, slots=True)
class PoolStats:
    """What a pool did so far.

    Attributes:
        nbytes: its bound: bytes of all slots together.
        slots: how many there are.
        leased: slots out of its hands now, those whose events have not happened included.
        peak: the most that were out at once.
        touched_nbytes: bytes of the slots that were ever used; the others cost no memory.
        waited: seconds spent waiting for a slot, all threads together.
    """

    nbytes: int
    slots: int
    leased: int
    peak: int
    touched_nbytes: int
    waited: float


class Slot:
    """One piece of a pool's memory, held by one owner at a time.

    ``memory`` is ``uint8 [slot_nbytes]``, page-aligned, valid until the holder's claim and all leases out of
    the slot have ended. Whoever keeps it longer reads somebody else's bytes.
    """

    __slots__ = ("_claims", "_pending", "_poison", "_pool", "holder", "memory")

    def __init__(self, pool: Pool, memory: torch.Tensor) -> None:
        self.memory = memory
        self.holder = ""
        self._pool = pool
        # The three below change under the pool's lock only.
        self._claims = 0
        self._pending: list[Event] = []
        self._poison: list[tuple[int, int, int]] = []

    def lease(self, spec: TensorSpec, offset: int) -> Lease:
        """Lease the tensor whose bytes start at ``offset`` of this slot. The slot outlives the lease."""
        raw = self.memory[offset : offset + spec.nbytes]
        with self._pool._changed:
            self._claims += 1
        return Lease(spec, raw=raw, guard=self._pool.guard, slot=self)

    def release(self, *after: Event) -> None:
        """End the holder's own claim. Leases out of the slot keep it until they end too.

        The slot is reused when all of ``after`` have happened.
        """
        self._end(after, None)

    def _end(self, after: tuple[Event, ...], poison: tuple[int, int, int] | None) -> None:
        if poison is not None and not after:
            _fill(self.memory, poison)
            poison = None
        with self._pool._changed:
            # Record the events before giving up the claim: a slot reused early is a wrong weight, not an error.
            self._pending.extend(after)
            if poison is not None:
                self._poison.append(poison)
            self._claims -= 1
            assert self._claims >= 0, "a slot was released twice"
            if self._claims == 0:
                self._pool._give_back(self)

    def __repr__(self) -> str:
        return f"<Slot {self.memory.numel()} bytes: {self.holder or 'free'}>"


def _fill(memory: torch.Tensor, poison: tuple[int, int, int]) -> None:
    start, stop, byte = poison
    memory[start:stop].fill_(byte)


class Pool:
    """A bounded, reused set of memory slots; thread-safe.

    Memory is mapped at the first ``acquire``, on huge pages, and page-locked when ``device`` is an
    accelerator. The bound is never exceeded. Closing ends every wait; memory of slots that are still held
    stays valid until the last tensor over it is gone.

    Args:
        slots: how many slots.
        slot_nbytes: size of each, in bytes; rounded up to whole pages.
        device: the device that copies out of the slots.
        guard: what happens to memory that comes back, see ``guards``.
    """

    def __init__(
        self,
        slots: int = 4,
        slot_nbytes: int = 16 * 1024 * 1024,
        *,
        device: torch.device | str = "cpu",
        guard: Guard = "off",
    ) -> None:
        if slots < 1 or slot_nbytes < 1:
            raise UsageError(f"a pool needs at least one slot of one byte; got {slots} slots of {slot_nbytes} bytes")
        check_guard(guard)
        self.slots = slots
        self.slot_nbytes = -(-slot_nbytes // PAGE) * PAGE
        self.nbytes = slots * self.slot_nbytes
        self.guard: Guard = guard
        self._device = torch.device(device)
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
            holder: who will hold it, for the message that others get when they wait in vain.
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
            self._waited += time.monotonic() - began
            slot.holder, slot._claims = holder, 1
            late, slot._poison = slot._poison, []
            self._peak = max(self._peak, self._used - len(self._free))
        for poison in late:
            _fill(slot.memory, poison)
        return slot

    def wake(self) -> None:
        """Make every waiting ``acquire`` look at its ``stop`` again."""
        with self._changed:
            self._changed.notify_all()

    def stats(self) -> PoolStats:
        """A snapshot of what the pool did so far."""
        with self._changed:
            leased = self._used - sum(1 for slot in self._free if _happened(slot))
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        stats = self.stats()
        return f"<Pool {self.slots} x {self.slot_nbytes / 2**20:g} MiB: {stats.leased} leased, peak {stats.peak}>"

    def _map(self) -> None:
        if self._all or self._closed:
            return
        region = pinned_empty(self.nbytes) if not is_host(self._device) else _huge_region(self.nbytes)
        self._all = [Slot(self, piece) for piece in torch.split(region, self.slot_nbytes)]

    def _ready(self) -> Slot | None:
        for index in range(len(self._free) - 1, -1, -1):
            if _happened(self._free[index]):
                slot = self._free.pop(index)
                slot._pending.clear()
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


def _happened(slot: Slot) -> bool:
    return all(event.query() for event in slot._pending)


def _huge_region(nbytes: int) -> torch.Tensor:
    """``nbytes`` of fresh host memory that starts on a huge page. Without that, direct reads are three times slower."""
    # Private: shared anonymous memory is shmem, which gets no huge pages unless the kernel is told to, and which a fork
    # would go on sharing.
    region = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if _MADV_HUGEPAGE is not None:
        with contextlib.suppress(OSError):  # A kernel without huge pages; everything works, slower.
            region.madvise(_MADV_HUGEPAGE)
    whole = torch.frombuffer(region, dtype=torch.uint8)
    return whole[-whole.data_ptr() % HUGE_PAGE :][:nbytes]


class Lease:
    """The right to read one tensor that lies in memory which will be reused.

    It ends at ``release()``, at the end of its ``with``, or when its stream advances. Under a guard, tensors
    taken from it are loud after that; without one they silently hold whatever the memory holds by then.

    Attributes:
        name: the tensor's name.
        spec: its spec.
        borrowed: whether the memory will be reused; if not, ``own()`` costs nothing.
        placed: whether the bytes lie where the consumer wished them (``Wish.into``); then ``tensor`` is that memory.
    """

    __slots__ = (
        "_after",
        "_raw",
        "_slot",
        "_tensor",
        "_wire",
        "_wrapped",
        "borrowed",
        "guard",
        "name",
        "placed",
        "spec",
    )

    def __init__(
        self,
        spec: TensorSpec,
        *,
        raw: torch.Tensor | None = None,
        tensor: torch.Tensor | None = None,
        borrowed: bool = True,
        guard: Guard = "off",
        slot: Slot | None = None,
        placed: bool = False,
    ) -> None:
        """For sources. Give ``raw`` (``uint8 [nbytes]``, aligned for the dtype) or ``tensor``, not both."""
        self.name = spec.name
        self.spec = spec
        self.borrowed = borrowed
        self.placed = placed
        self.guard = guard
        self._raw = raw
        self._tensor = tensor
        self._slot = slot
        self._wire = Tripwire(spec.name)
        self._wrapped: torch.Tensor | None = None
        self._after: Event | None = None  # Set once, by ``release``.

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor, to read until the lease ends. Never write to it.

        Raises:
            StaleLease: the lease is over.
            UnsupportedDtype: the installed torch has no such dtype; take ``raw``.
        """
        self._wire.check()
        if self.guard != "trap":
            return self._plain()
        if self._wrapped is None:
            self._wrapped = TrapTensor(self._plain(), self._wire) if self.borrowed else self._plain()
        return self._wrapped

    @property
    def raw(self) -> torch.Tensor:
        """The tensor's bytes in row-major order, ``uint8 [nbytes]``, to read until the lease ends."""
        self._wire.check()
        if self._raw is None:
            assert self._tensor is not None
            self._raw = self._tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        return TrapTensor(self._raw, self._wire) if self.guard == "trap" and self.borrowed else self._raw

    def own(self) -> torch.Tensor:
        """A contiguous tensor that nobody will overwrite: a copy if the memory is borrowed, the tensor itself if not.

        It belongs to the caller, and outlives the lease.
        """
        self._wire.check()
        plain = self._plain()
        return plain.detach().clone(memory_format=torch.contiguous_format) if self.borrowed else plain.contiguous()

    def pending(self) -> bool:
        """Whether the event given to ``release`` has yet to happen. Never blocks; for sources that reuse memory."""
        return self._after is not None and not self._after.query()

    def release(self, after: Event | None = None) -> None:
        """End the lease. Its memory may be reused at once, or once ``after`` has happened. May be called twice."""
        if self._wire.over:
            return
        self._wire.over = True
        self._after = after
        slot, raw = self._slot, self._raw
        self._slot = self._raw = self._tensor = self._wrapped = None
        if slot is None:
            return
        poison = None
        if self.guard != "off":
            assert raw is not None
            start = raw.data_ptr() - slot.memory.data_ptr()
            poison = (start, start + raw.numel(), poison_byte(self.spec.dtype))
        slot._end(() if after is None else (after,), poison)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<Lease {self.spec}: {'over' if self._wire.over else 'running'}>"

    def _plain(self) -> torch.Tensor:
        if self._tensor is None:
            assert self._raw is not None
            if isinstance(self.spec.dtype, OpaqueDtype):
                raise UnsupportedDtype(
                    f"tensor {self.name!r} has dtype {self.spec.dtype}, for which torch {torch.__version__} has no "
                    "type; take .raw for its bytes"
                )
            self._tensor = self._raw.view(self.spec.dtype).view(self.spec.shape)
        return self._tensor
