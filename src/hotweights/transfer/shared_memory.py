"""Slots: shared memory in one sealed memfd, which a sender writes and receivers map read-only."""

from __future__ import annotations

import fcntl
import itertools
import logging
import mmap
import os
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from ..errors import PeerLost, ProtocolError, TransferError, UsageError
from ..memory.addresses import PAGE
from ..memory.host import ALIGNMENT, host_empty
from ..notices import log
from .flow import Inflow, Waitable
from .messages import Filled
from .origins import Origins
from .roll import Roll, roll_nbytes

_Result = TypeVar("_Result")

_FUTURE_WRITE = getattr(fcntl, "F_SEAL_FUTURE_WRITE", 0x10)
_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def aligned(offset: int) -> int:
    """The next offset at which a tensor may begin, whatever its dtype."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


class WriteSlots:
    """The sender's side. The memory is freed with the last tensor over it and the last receiver.

    Attributes:
        memories: one ``uint8 [slot_nbytes]`` for each slot, page-aligned.
        roll: lies behind them.
        descriptor: what receivers are sent.
        write_protected: whether the kernel keeps receivers from mapping it writable.
    """

    def __init__(self, slots: int, slot_nbytes: int, *, sealed: bool = True) -> None:
        """Allocate all of the memory now.

        Args:
            slots: how many.
            slot_nbytes: bytes of each.
            sealed: if not, others may map it writable until ``seal``.

        Raises:
            TransferError: there is not enough.
        """
        if slots < 1 or slot_nbytes < 1:
            raise UsageError(f"at least one slot of one byte is needed; got {slots} slots of {slot_nbytes} bytes")
        self.slot_nbytes = -(-slot_nbytes // PAGE) * PAGE
        nbytes = slots * self.slot_nbytes
        self.descriptor = -1
        self._fills = itertools.count(1)
        try:
            region = self._region(nbytes, roll_nbytes(slots))
            whole = torch.frombuffer(region, dtype=torch.uint8, count=nbytes)
            whole.zero_()  # Touched once: page faults cost more than copies.
            self.roll = Roll(memoryview(region)[nbytes:], slots)
            self.write_protected = False
            if sealed:
                self.seal()
        except BaseException:
            self.close()
            raise
        self.memories: tuple[torch.Tensor, ...] = torch.split(whole, self.slot_nbytes)

    def _region(self, nbytes: int, behind: int) -> mmap.mmap:
        try:
            self.descriptor = os.memfd_create("hotweights-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            # Without it, missing memory is a SIGBUS at the first write.
            os.posix_fallocate(self.descriptor, 0, nbytes + behind)
            return mmap.mmap(self.descriptor, nbytes + behind)
        except (OSError, OverflowError) as error:
            raise TransferError(f"no shared memory of {nbytes} bytes for the slots: {error}") from error

    def seal(self) -> None:
        """Nobody maps it writable from now on."""
        self.write_protected = _seal(self.descriptor)

    def next_fill(self) -> int:
        """A number that no fill of a slot had before."""
        return next(self._fills)

    def close(self) -> None:
        """Let go. May be called twice."""
        self.memories = ()
        if hasattr(self, "roll"):  # It is not there yet when there was no memory.
            self.roll.close()
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _seal(descriptor: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SIZE | _FUTURE_WRITE | fcntl.F_SEAL_SEAL)
    except OSError:  # Linux before 5.1 does not know the seal. Our own receivers map read-only all the same.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SIZE | fcntl.F_SEAL_SEAL)
        log(
            logging.WARNING,
            "this kernel cannot forbid receivers to write into the slots; F_SEAL_FUTURE_WRITE needs Linux 5.1",
        )
        return False
    return True


class ReadSlots:
    """A receiver's side: mapped read-only.

    Attributes:
        memories: as the sender's. Writing to one kills the process.
        roll: the sender's.
    """

    def __init__(self, descriptor: int, slots: int, slot_nbytes: int) -> None:
        """Map the slots. The descriptor stays the caller's.

        Raises:
            ProtocolError: the memory is smaller than promised, or could become so: reading would kill the process.
            TransferError: this process cannot map so much.
        """
        nbytes, behind = slots * slot_nbytes, roll_nbytes(slots)
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError as error:
            raise ProtocolError(f"the slots are no sealed memory: {error}") from error
        if not seals & fcntl.F_SEAL_SHRINK:
            raise ProtocolError("the slots are not sealed against shrinking")
        status = os.fstat(descriptor)
        size = status.st_size
        if slots < 1 or slot_nbytes < 1 or slot_nbytes % PAGE or size < nbytes + behind:
            raise ProtocolError(
                f"{slots} slots of {slot_nbytes} bytes were promised, and a roll of {behind}; "
                f"the memory has {size} bytes"
            )
        if status.st_blocks * 512 < nbytes + behind:  # Reading a hole may find no memory: a SIGBUS.
            raise ProtocolError(f"{size} bytes were promised for the slots; only {status.st_blocks * 512} are there")
        try:
            region = mmap.mmap(descriptor, nbytes + behind, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ)
        except OSError as error:
            raise TransferError(f"{slots} slots of {slot_nbytes} bytes cannot be mapped: {error}") from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch has no read-only tensors, and says so.
            whole = torch.frombuffer(region, dtype=torch.uint8, count=nbytes)
        self.roll = Roll(memoryview(region)[nbytes:], slots)
        self.memories: tuple[torch.Tensor, ...] = torch.split(whole, slot_nbytes)

    def bears(self, slot: int, fill: int) -> bool:
        """Whether what was read of the slot was of this fill, to the end."""
        return self.roll.bears(slot, fill)

    def close(self) -> None:
        """Let go. The mapping ends with the last tensor over it."""
        self.memories = ()


class OwnSlots:
    """A receiver's own slots, on another host than the sender's: a flow fills them.

    Attributes:
        memories: as the sender's.
        origins: others that fill them beside the sender.
        sender: who that is, for people.
    """

    roll = None
    sender = "the sender"

    def __init__(self, flow: Inflow, slots: int, slot_nbytes: int) -> None:
        """Takes over the flow.

        Raises:
            ProtocolError: nobody has such slots. The flow is closed.
            TransferError: there is not enough memory. The flow is closed.
        """
        self._flow = flow
        self._lacks = False  # whether something is expected by the flow that is not there
        self.origins = Origins()
        try:
            if slots < 1 or slot_nbytes < 1 or slot_nbytes % PAGE:
                raise ProtocolError(f"{slots} slots of {slot_nbytes} bytes were promised")
            self.memories = self._made(slots, slot_nbytes)
        except TransferError:
            flow.close()
            raise
        except (MemoryError, RuntimeError) as error:
            flow.close()
            raise TransferError(f"no memory for {slots} slots of {slot_nbytes} bytes: {error}") from error

    def _made(self, slots: int, slot_nbytes: int) -> tuple[torch.Tensor, ...]:
        return tuple(host_empty((slot_nbytes,), torch.uint8) for _ in range(slots))

    @property
    def flow(self) -> Inflow:
        """What fills them."""
        return self._flow

    def expect(self, filled: Filled) -> None:
        """The flow brings next what a slot holds, by what was said of it.

        Raises:
            ProtocolError: there is no such slot, or something of it does not lie in it.
        """
        if not 0 <= filled.slot < len(self.memories):
            raise ProtocolError(f"there is no slot {filled.slot}; there are {len(self.memories)}")
        memory = self.memories[filled.slot]
        if any(chunk.offset < 0 or chunk.offset + chunk.nbytes > memory.numel() for chunk in filled.chunks):
            raise ProtocolError(f"what is to lie in slot {filled.slot} does not fit into its {memory.numel()} bytes")
        self._flow.expect(memory, self.origins.expect(filled, memory))
        self._lacks = True

    def fill(self, fill: int, behind: int) -> bool:
        """Take what has come. Returns whether the slot that bears this fill is whole, and all that was told before.

        ``behind`` it so many more are expected.

        Raises:
            PeerLost: who was to send it is gone.
            ProtocolError: something else came.
        """
        lacking = self._named(self._flow.take)
        self._lacks = lacking > 0
        return self.origins.fill(fill) and lacking <= behind

    def greet(self) -> None:
        """Say who this is, to all who are to send something.

        Raises:
            PeerLost: the sender's flow is gone.
        """
        self._named(self._flow.greet)
        self.origins.greet()

    def _named(self, act: Callable[[], _Result]) -> _Result:
        """Do it; an error says who is lost."""
        try:
            return act()
        except PeerLost as error:
            raise PeerLost(f"{self.sender}: {error}") from error

    @property
    def awaited(self) -> list[tuple[Waitable, bool]]:
        """What to wait for. Then ``greet``, or ``fill`` if something is expected."""
        own = [self._flow.awaited] if self._lacks or self._flow.greets else []
        return [*own, *self.origins.awaited]

    def give_up(self) -> None:
        """Nothing that is expected is waited for."""
        self._lacks = False
        self.origins.drop()

    def bears(self, slot: int, fill: int) -> bool:
        """Always: nobody else writes to them."""
        return True

    def close(self) -> None:
        """Let go. May be called twice."""
        self._flow.close()
        self.origins.close()
        self.memories = ()


class RelaySlots(OwnSlots):
    """A relay's slots: a flow fills them, and the workers on its host read them, as they read a sender's.

    Attributes:
        shared: the same, for those workers. The relay closes them.
    """

    shared: WriteSlots

    def _made(self, slots: int, slot_nbytes: int) -> tuple[torch.Tensor, ...]:
        self.shared = WriteSlots(slots, slot_nbytes)
        return self.shared.memories
