"""Slot and Lease: the right to read one tensor that lies in memory which will be reused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from .. import signals
from ..dtypes import OpaqueDtype
from ..errors import UnsupportedDtype
from ..manifest import TensorSpec
from .devices import Event
from .guards import Guard, TrapTensor, Tripwire, poison_byte, stricter

Poison = tuple[int, int, int]
"""Fill a slot's memory from the first number to the second with the third, a byte."""


@signals.held_throughout
class Slot:
    """One piece of a pool's memory, held by one owner at a time.

    Attributes:
        memory: ``uint8 [slot_nbytes]``, page-aligned. It is valid until the holder's claim and all leases out of the
            slot have ended. Whoever keeps it longer reads somebody else's bytes.
        holder: who holds it, for messages; empty before the first time.
        claims: how many have yet to end: the holder's, and one for each lease.
        pending: events that must happen before it is used again.
        poison: what could not be filled yet, because a device may still read it.
    """

    __slots__ = ("_give_back", "_guard", "_lock", "claims", "holder", "memory", "pending", "poison")

    def __init__(
        self,
        memory: torch.Tensor,
        *,
        guard: Guard,
        lock: AbstractContextManager[object],
        give_back: Callable[[Slot], None],
    ) -> None:
        """For pools. ``give_back`` is called under ``lock`` when the last claim has ended."""
        self.memory = memory
        self.holder = ""
        self._guard: Guard = guard
        self._lock = lock
        self._give_back = give_back
        # These three change under the lock only.
        self.claims = 0
        self.pending: list[Event] = []
        self.poison: list[Poison] = []

    def lease(self, spec: TensorSpec, offset: int, guard: Guard = "off") -> Lease:
        """Lease the tensor whose bytes start at ``offset`` of this slot. The slot outlives the lease.

        The pool's guard holds if it is stricter than ``guard``.
        """
        raw = self.memory[offset : offset + spec.nbytes]
        with self._lock:
            self.claims += 1
        return Lease(spec, raw=raw, guard=stricter(guard, self._guard), slot=self)

    def release(self, *after: Event) -> None:
        """End the holder's own claim. The slot is used again when its leases have ended and ``after`` has happened."""
        self._end(after, None)

    def _end(self, after: tuple[Event, ...], poison: Poison | None) -> None:
        if poison is not None and not after:
            fill(self.memory, poison)
            poison = None
        with self._lock:
            # Record the events before giving up the claim: a slot reused early is a wrong weight, not an error.
            self.pending.extend(after)
            if poison is not None:
                self.poison.append(poison)
            self.claims -= 1
            assert self.claims >= 0, "a slot was released twice"
            if self.claims == 0:
                self._give_back(self)

    def is_ready(self) -> bool:
        """Whether every event has happened after which it may be used again. Never blocks."""
        return all(event.query() for event in self.pending)

    def __repr__(self) -> str:
        return f"<Slot {self.memory.numel()} bytes: {self.holder or 'free'}>"


def fill(memory: torch.Tensor, poison: Poison) -> None:
    """Poison a part of a slot."""
    start, stop, byte = poison
    memory[start:stop].fill_(byte)


class Lease:
    """The right to read one tensor that lies in memory which will be reused.

    It ends at ``release()``, at the end of its ``with``, or when its stream advances. After that, tensors taken from it
    are loud under a guard; without one they silently hold whatever the memory holds by then.

    Attributes:
        name: the tensor's name.
        spec: its spec.
        borrowed: whether the memory will be reused; if not, ``own()`` costs nothing.
        placed: whether the bytes lie where the request wanted them (``Request.into``); ``tensor`` is that memory then.
        guard: what makes tensors loud that are used later.
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
        """For sources. They give ``raw`` (``uint8 [nbytes]``, aligned for the dtype) or ``tensor``, not both."""
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
        """A contiguous tensor that is the caller's and outlives the lease: a copy if the memory is borrowed."""
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

    def __exit__(self, *error: object) -> None:
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
