"""Keeper: the last version that a relay's group has taken, in the relay's memory, for workers that come later."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..errors import ProtocolError, TransferAborted
from ..manifest import Manifest, TensorSpec
from ..memory.host import host_empty
from ..memory.lease import Lease
from ..notices import log
from ..sources.state_dict import StateSource
from ..text import size
from .arrival import Arrival
from .copying import copy_out
from .decision import Decision, Known
from .messages import Account, Chunk, Offer, Wanted, short_version
from .peers import Peer
from .shared_memory import aligned
from .wishes import merged


@dataclass(frozen=True, slots=True)
class KeptVersion:
    """A version, all of it.

    Attributes:
        version: its name.
        update: by which its group took it.
        epoch: of the lead that had it taken.
        digests: whether receivers compare what they copy.
        manifest: its tensors.
        memory: ``uint8 [n]``: their bytes, one after the other.
    """

    version: str | int
    update: int
    epoch: int
    digests: bool
    manifest: Manifest
    memory: torch.Tensor

    @property
    def account(self) -> Account:
        """What became of it, for who is in doubt about it. No place is named: who took it may be gone."""
        return Account(self.update, -1, Known.COMMITTED, short_version(self.version))

    def source(self) -> StateSource:
        """Its tensors, in the memory that is kept. Close it."""
        rooms = zip(self.manifest.values(), _rooms(self.manifest.values(), self.memory), strict=True)
        return StateSource({spec.name: Lease(spec, raw=room).tensor for spec, room in rooms})


class Collected:
    """A version on its way through a relay, which notes every byte of it."""

    def __init__(self, kept: KeptVersion) -> None:
        self.kept = kept
        self._missing: dict[int, Arrival] = {}
        specs = list(kept.manifest.values())
        for number, (spec, room) in enumerate(zip(specs, _rooms(specs, kept.memory), strict=True)):
            arrival = self._missing[number] = Arrival(number, spec, ())
            arrival.memory = room

    def wish(self, orders: Sequence[Sequence[Wanted]]) -> tuple[Wanted, ...]:
        """Everything; first what workers want, in their order."""
        first = merged(orders)
        return tuple(Wanted(number) for number in dict.fromkeys((*first, *self._missing)))

    def take(self, memory: torch.Tensor, chunks: Iterable[Chunk]) -> None:
        """Copy what a slot holds, and compare the digests.

        Raises:
            TransferAborted: it is not what the sender held.
            ProtocolError: something came that was not asked for, or came before.
        """
        for chunk in chunks:
            arrival = self._missing.get(chunk.tensor)
            if arrival is None or chunk.rounded or chunk.shrunk != 1:
                raise ProtocolError(f"tensor number {chunk.tensor} came otherwise than it was asked for, or twice")
            arrival.take(chunk.range)
            raw, room = memory[chunk.offset : chunk.offset + chunk.nbytes], arrival.room(chunk.range)
            if copy_out(raw, room, hashed=chunk.digest is not None) != chunk.digest:
                raise TransferAborted(
                    "the update was aborted", [f"{arrival.spec.name}: what the relay copied is not what was sent"]
                )
            if arrival.complete:
                del self._missing[chunk.tensor]

    def check_complete(self) -> None:
        """Check that all of it has come.

        Raises:
            ProtocolError: something is missing.
        """
        if self._missing:
            missing = [f"{arrival.spec.name}: it never came" for arrival in self._missing.values()]
            raise ProtocolError("the sender ended before everything was there", missing)


class Keeper:
    """Keeps one version, and takes in the next. Never more bytes than ``limit``; one thread uses it.

    Where two versions do not fit, the one before is let go when the next one begins; nobody is given anything then
    until one is taken again.

    Attributes:
        kept: the last version that the group has taken, if it is here and the group is known to have taken no other.
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept: KeptVersion | None = None
        self._coming: Collected | None = None
        self._update = 0  # by which the one comes that comes
        # By which update, it, and the one before.
        self._doubted: tuple[int, KeptVersion | None, KeptVersion | None] | None = None
        self._spare: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds now."""
        doubted = () if self._doubted is None else self._doubted[1:]
        coming = None if self._coming is None else self._coming.kept
        kept = [version.memory for version in (self.kept, coming, *doubted) if version is not None]
        return sum(memory.nbytes for memory in (*kept, self._spare) if memory is not None)

    def begin(self, offer: Offer, update: int, manifest: Manifest) -> Collected | None:
        """The next version is offered. Returns what takes it in; ``None`` if there is no room for it."""
        self._doubted = self._coming = None  # Who leads now knows better, or nobody does.
        self._update = offer.kept or update
        memory = self._room(sum(aligned(spec.nbytes) for spec in manifest.values()), offer.version)
        if memory is not None:
            kept = KeptVersion(offer.version, self._update, offer.epoch, offer.digests, manifest, memory)
            self._coming = Collected(kept)
        return self._coming

    def end(self, decision: Decision | None) -> None:
        """What the group has decided about the version that came. If that is not known here, nobody is given anything
        until ``settle``: the version before may be no longer the last.
        """
        new, before = None if self._coming is None else self._coming.kept, self.kept
        self._coming = None
        if decision is None:
            self.kept, self._doubted = None, (self._update, new, before)
        elif decision is Decision.COMMIT:
            self._keep(new)
        elif new is not None:
            self._spare = new.memory

    def settle(self, update: int, decision: Decision | None) -> None:
        """Somebody says what became of an update."""
        if self._doubted is not None and decision is not None and update == self._doubted[0]:
            (_, new, self.kept), self._doubted = self._doubted, None
            if decision is Decision.COMMIT:
                self._keep(new)

    def late(self, workers: Iterable[Peer]) -> list[Peer]:
        """Those that have nothing yet, or a version before the one that is kept. Each is among them once."""
        kept = self.kept
        return [] if kept is None else [peer for peer in workers if lacks(peer, kept.update, kept.epoch)]

    def _keep(self, version: KeptVersion | None) -> None:
        before, self.kept = self.kept, version
        if before is not None:
            self._spare = before.memory
        if version is not None:
            message = "version %r is kept for workers that come later; versions take %s of memory here"
            log(logging.INFO, message, version.version, size(self.nbytes))

    def _room(self, nbytes: int, version: str | int) -> torch.Tensor | None:
        if nbytes > self.limit:
            self._spare = None
            log(
                logging.WARNING,
                "version %r is not kept: it has %s, and keep= allows %s; who comes later waits for the next one",
                version,
                size(nbytes),
                size(self.limit),
            )
            return None
        if self._spare is not None and self._spare.nbytes == nbytes:
            memory, self._spare = self._spare, None
            return memory
        self._spare = None
        if self.kept is not None and self.kept.memory.nbytes + nbytes > self.limit:
            self._keep(None)
            return self._room(nbytes, version)
        try:
            return host_empty((nbytes,), torch.uint8)
        except (MemoryError, RuntimeError) as error:
            log(logging.WARNING, "version %r is not kept, for lack of memory: %s", version, str(error))
            return None


def lacks(peer: Peer, update: int, epoch: int) -> bool:
    """Whether a worker has not had the version of an update, by what it has told, and was offered nothing here.

    Of a later lead, or a later update, it may have had any: it is never sent back.
    """
    if peer.channel.session.update or peer.epoch > epoch:
        return False
    if peer.epoch < epoch:
        return True
    took = any(account.update == update and account.outcome is Known.COMMITTED for account in peer.accounts)
    return not took and all(account.update <= update for account in peer.accounts)


def _rooms(specs: Iterable[TensorSpec], memory: torch.Tensor) -> list[torch.Tensor]:
    rooms, start = [], 0
    for spec in specs:
        rooms.append(memory[start : start + spec.nbytes])
        start += aligned(spec.nbytes)
    return rooms
