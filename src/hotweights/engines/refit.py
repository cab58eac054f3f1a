"""RefitEnd: one process of a trainer or of a rollout, for stacks that bring both together and stream between them.

verl's and NeMo-RL's checkpoint engines are made of it; this file knows neither.
"""

from __future__ import annotations

import asyncio
import os
import queue
import shutil
import socket
import tempfile
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..arguments import check_flags, check_seconds
from ..errors import TransferAborted, UsageError
from ..manifest import Manifest, TensorSpec
from ..sources.pairs import Pair
from ..transfer.endpoint import check_connectable
from ..transfer.receiver import Receiver
from ..transfer.report import SendReport
from ..transfer.sender import Sender

Pairs = Iterable[Pair] | AsyncIterable[Pair]


@dataclass(frozen=True, slots=True)
class Directions:
    """Where an engine's workers take the next version from by themselves.

    Attributes:
        address: of the trainer's sender.
        timeout: seconds that each single wait may take.
        keys: the directory of the job's keys, for addresses of other hosts.
        insecure: go without keys.
    """

    address: str
    timeout: float
    keys: str | None
    insecure: bool


class RefitEnd:
    """Sends versions, where it is the first of the trainer's; else takes them, or only reads along.

    The stack calls ``describe`` everywhere, and ``connect`` with what all have said, before each version or once.
    """

    def __init__(
        self,
        *,
        timeout: float = 60.0,
        address: str | None = None,
        keys: str | None = None,
        insecure: bool = False,
        direct: bool = False,
    ) -> None:
        """Nothing is connected yet.

        Args:
            timeout: seconds that each single wait of either end may take.
            address: of the sender, as in ``hotweights.Sender``; by default a new one on this host.
            keys: the directory of the job's keys, for addresses of other hosts.
            insecure: go without keys, see ``hotweights.Sender``.
            direct: rollouts take nothing themselves: each has one worker of an engine, which is told where to take it.

        Raises:
            UsageError: an option is wrong, or nobody can connect to ``address``.
        """
        if address is not None:
            check_connectable(address)
        check_flags(direct=direct, insecure=insecure)
        check_seconds(timeout=timeout)
        self._timeout, self._given, self._direct = timeout, address, direct
        self._open: dict[str, Any] = {"keys": keys, "insecure": insecure}
        self._address: str | None = None
        self._theirs: str | None = None
        self._receivers = 0
        self._sender: Sender | None = None
        self._receiver: Receiver | None = None
        self._manifest: Manifest | None = None  # of the last version: trainers say nothing of the next one before

    def describe(self) -> dict[str, Any]:
        """What the others must know: plain data."""
        if self._address is None:
            self._address = self._given or f"unix:{_folder_of(self)}/trainer"
        return {"host": socket.gethostname(), "user": os.getuid(), "address": self._address}

    def connect(self, ends: Sequence[Mapping[str, Any]], *, rank: int, trainers: int) -> None:
        """Learn who sends, and be it on rank 0. Called again, it does what is new.

        Args:
            ends: what each has described, trainers first.
            rank: which of them this is.
            trainers: how many of them are the trainer's.

        Raises:
            UsageError: they are on several hosts, or several users', and no ``address`` was given.
        """
        for what in ("host", "user") if self._given is None else ():
            several = sorted({str(end[what]) for end in ends})
            if len(several) > 1:
                raise UsageError(
                    f"the trainer and the rollouts have several {what}s: {', '.join(several)}; pass address='tcps://"
                    "HOST:PORT' of the trainer's first rank, and keys="
                )
        address: str = ends[0]["address"]
        self._receivers, self._theirs = len(ends) - trainers, address
        if rank == 0:
            self._sender = self._sender or Sender(address, timeout=self._timeout, **self._open)
        elif rank >= trainers and not self._direct and (self._receiver is None or self._receiver.address != address):
            self.close()
            name = f"rollout {rank - trainers}"
            # The sender is there by now: one that is gone is not waited for.
            self._receiver = Receiver(address, name=name, timeout=self._timeout, reconnect=False, **self._open)

    async def send(self, weights: Pairs, version: str | int) -> SendReport | None:
        """Send one version to all rollouts. Every rank of the trainer calls it, since all of them gather.

        The first version is kept on the host until it is sent; later ones go as they come, if they have the same names,
        dtypes and shapes.

        Returns:
            What was sent, on rank 0.

        Raises, on rank 0:
            TransferError: as ``Sender.send``. The next version may be sent.
        """
        if self._sender is None:
            await _exhaust(weights)
            return None
        manifest, self._manifest = self._manifest, None
        if manifest is None:
            kept = await self._kept(weights, version)
            manifest = Manifest(TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in kept)
            report = await asyncio.to_thread(self._sent, kept, manifest, version)
        else:
            handed = _Handed()
            sending = asyncio.ensure_future(asyncio.to_thread(self._sent, handed, manifest, version))
            try:
                async for pair in pairs_of(weights):  # To the end in any case: other ranks gather with this one.
                    await handed.give(pair, sending)
            except BaseException as error:
                handed.fail(error)
                raise
            finally:
                handed.end()
                await asyncio.wait([sending])
                sending.exception()  # Else asyncio says that nobody has asked for it.
            report = sending.result()
        self._manifest = manifest
        return report

    async def _kept(self, weights: Pairs, version: str | int) -> list[Pair]:
        try:
            return [(name, tensor.detach().to("cpu", copy=True)) async for name, tensor in pairs_of(weights)]
        except Exception as error:
            failed = _Handed()
            failed.fail(error)
            with suppress(Exception):  # The rollouts wait for this version.
                await asyncio.to_thread(self._sent, failed, Manifest([]), version)
            raise

    def _sent(self, pairs: Iterable[Pair], manifest: Manifest, version: str | int) -> SendReport:
        assert self._sender is not None, "only who has one sends"
        given = (pair for pair in pairs)
        count = self._receivers
        return self._sender.send(given, version=version, manifest=manifest, receivers=count, show_progress=False)

    async def receive(self) -> AsyncIterator[Pair]:
        """The tensors of the next version, owned by the caller, who takes it by reading to the end.

        Raises:
            TransferError: the version was given up, or the sender is lost.
        """
        receiver = self._receiver
        if receiver is None:
            raise UsageError("this is no rollout, or connect was not called")
        tensors = receiver.tensors()
        try:
            while (pair := await asyncio.to_thread(next, tensors, None)) is not None:
                yield pair
        except GeneratorExit:
            receiver.refuse(TransferAborted(f"{receiver.name} stopped reading; its own log says why"))
            raise

    def directions(self) -> Directions:
        """What the workers beside a rollout must know, with ``direct``."""
        if self._theirs is None:
            raise UsageError("connect was not called")
        return Directions(self._theirs, self._timeout, **self._open)

    def close(self) -> None:
        """Let go of the other end. May be called twice; ``connect`` connects again."""
        for end in (self._sender, self._receiver):
            if end is not None:
                end.close()
        self._sender = self._receiver = None


class _Handed:
    """Pairs that a coroutine hands to a thread, one at a time: each is read before the next one is made."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pairs: queue.SimpleQueue[Pair | BaseException | None] = queue.SimpleQueue()
        self._asked = asyncio.Event()

    async def give(self, pair: Pair, taker: asyncio.Future[Any]) -> None:
        """Hand it over, and wait until it was read, or the taker has ended."""
        self._asked.clear()
        self._pairs.put(pair)
        asked = asyncio.ensure_future(self._asked.wait())
        await asyncio.wait([asked, taker], return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()

    def fail(self, error: BaseException) -> None:
        """Let the thread know that there will be no more, and why."""
        self._pairs.put(error)

    def end(self) -> None:
        """Let it know that these were all."""
        self._pairs.put(None)

    def __iter__(self) -> Iterator[Pair]:
        while (pair := self._pairs.get()) is not None:
            if isinstance(pair, BaseException):
                raise TransferAborted(f"the trainer failed: {type(pair).__name__}: {pair}") from pair
            yield pair
            del pair
            self._loop.call_soon_threadsafe(self._asked.set)


async def pairs_of(weights: Pairs) -> AsyncIterator[Pair]:
    """The pairs, however they are given."""
    if isinstance(weights, AsyncIterable):
        async for pair in weights:
            yield pair
    else:
        for pair in weights:
            yield pair


async def _exhaust(weights: Pairs) -> None:
    async for _ in pairs_of(weights):
        pass


def _folder_of(end: RefitEnd) -> str:
    """A new folder of this user's alone, which goes with the end."""
    folder = tempfile.mkdtemp(prefix="hotweights-")
    weakref.finalize(end, shutil.rmtree, folder, ignore_errors=True)
    return folder
