"""Sender: the trainer's end of a transfer, as its users hold it. Each version that it sends is an ``Outbound``."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Literal, overload

import torch
from torch import nn

from .. import signals
from ..arguments import check_choices, check_count, check_flags, check_seconds, check_version
from ..errors import Closed, TransferError, UsageError
from ..forked import alone_in_a_fork
from ..manifest import Manifest
from ..memory import devices
from ..memory.wrappers import is_wrapper
from ..model.as_saved import as_saved
from ..progress import progress
from ..sources.contracts import InMemory, Source, warnings_of
from ..sources.iterator import from_iterator
from ..sources.opening import AnySource, is_pairs, opened
from ..sources.pairs import pairs_of
from ..sources.state_dict import StateSource, check_whole
from ..text import some
from ..timeline import Timeline
from .copying import wrapped
from .doubts import Decided, tell
from .endpoint import endpoints_of
from .outbound import Outbound
from .peers import Peer, PeerGroup
from .register import Register
from .register_table import register_of
from .report import SendReport
from .send_handle import LAST_LINES, SendHandle
from .shared_memory import WriteSlots
from .waits import left

OnLost = Literal["abort", "drop"]
"""When a receiver is lost during an update: nobody takes the version, or all others do."""

_REMEMBERED = 16  # updates whose decision is kept

Sendable = AnySource | Iterable[tuple[str, torch.Tensor]]


class Sender:
    """Sends versions to the receivers that connect to an address. A context manager.

    Bytes go through a few slots of shared memory, filled once for all receivers; those on other hosts are sent what
    they want of each. One version is sent at a time. Between
    two of them nothing runs, and receivers that connect wait.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        receivers: int = 1,
        slots: int = 4,
        slot_nbytes: int = 4 * 1024 * 1024,
        digests: bool = True,
        timeout: float = 60.0,
        on_lost: OnLost = "abort",
        keys: str | os.PathLike[str] | None = None,
        insecure: bool = False,
        decision: str | None = None,
    ) -> None:
        """Take the address. Nobody is waited for yet.

        Args:
            address: ``unix:PATH``. The directory must be this user's alone; one that does not exist is made so. Or
                ``tcps://HOST:PORT``, for receivers on other hosts; port 0 is one that is free, see ``self.address``.
                Several: one group of receivers comes to all of them.
            receivers: how many must be connected before anything is sent. All that are connected take part.
            slots: pieces of shared memory; two are enough for filling one while another is read.
            slot_nbytes: bytes of each; best when all of them fit into the CPU's last cache. Larger tensors are split.
            digests: whether receivers compare what they copied with what this side held.
            timeout: seconds that each single wait may take.
            on_lost: what happens to an update when a receiver dies, fails or does not answer, see ``OnLost``.
            keys: the directory of the job's keys, which ``hotweights keys`` makes; for ``tcps:``.
            insecure: go without keys in a network where anybody may send and take weights.
            decision: where decisions are written once: ``file:///DIRECTORY``, which all hosts see at that path,
                ``s3://BUCKET/FOLDER`` or ``etcd://HOST:PORT/PREFIX``. Members that lose this process read it there.
                Without it those on other hosts are in doubt then.

        Raises:
            AddressTaken: another sender is there; the message says which process.
            UsageError: the address or an option is wrong.
        """
        check_choices(on_lost=(on_lost, OnLost))
        check_count(1, receivers=receivers, slots=slots, slot_nbytes=slot_nbytes)
        check_flags(digests=digests)
        check_seconds(timeout=timeout)
        check_flags(insecure=insecure)
        self._register: Register | None = None if decision is None else register_of(decision)
        if self._register is not None:
            self._register.probe()
        endpoints = endpoints_of(address, keys=keys, insecure=insecure)
        self._receivers, self._timeout, self._digests = receivers, timeout, digests
        self._drop = on_lost == "drop"
        self._slots = WriteSlots(slots, slot_nbytes)
        try:
            self._group = PeerGroup(endpoints, self._slots, timeout)
        except BaseException:
            self._slots.close()
            raise
        self.address = ", ".join(self._group.addresses)
        # Random, so that a late message of a sender that was here before is not taken for one of this sender's.
        # Receivers take the first id that they see, and after that only larger ones.
        self._update = secrets.randbits(62)
        self._epoch = 0  # before the first version
        self._decided: dict[int, Decided] = {}  # by update, of the last ones
        self._sending = threading.Lock()
        self._process = os.getpid()
        self._thread: int | None = None  # the one that sends; only it changes this
        self._beside: threading.Thread | None = None  # the last one that sent with ``wait=False``
        self._closed = False

    @overload
    def send(
        self,
        tensors: Sendable,
        *,
        version: str | int,
        manifest: Manifest | None = None,
        receivers: int | None = None,
        show_progress: bool | None = None,
        wait: Literal[True] = True,
    ) -> SendReport: ...

    @overload
    def send(
        self,
        tensors: Sendable,
        *,
        version: str | int,
        manifest: Manifest | None = None,
        receivers: int | None = None,
        show_progress: bool | None = None,
        wait: Literal[False],
    ) -> SendHandle: ...

    @alone_in_a_fork()
    @signals.watched
    def send(
        self,
        tensors: Sendable,
        *,
        version: str | int,
        manifest: Manifest | None = None,
        receivers: int | None = None,
        show_progress: bool | None = None,
        wait: bool = True,
    ) -> SendReport | SendHandle:
        """Send one version; return when every receiver has it.

        Tensors are read only while this runs: nobody may change them before it returns. With ``wait=False`` it returns
        at once, and nobody may change them before ``SendHandle.done``.

        Args:
            tensors: a mapping, a module, a source or a path; or pairs of name and tensor. With ``manifest`` pairs are
                sent as they come. Without it they are read to the end first, and all tensors are kept until the return.
                Of a transformers model what ``save_pretrained`` would write is sent.
            version: its name.
            manifest: what the pairs will be.
            receivers: how many must be connected this time.
            show_progress: whether to draw a progress bar; by default on a terminal or in a notebook.
            wait: whether to wait for the receivers. If not, a thread does, and ``SendHandle.result`` says how it ended.
                What is sent is opened before this returns; only pairs with ``manifest`` are iterated in the thread.

        Raises:
            TransferAborted: nobody has it; each problem begins with the name of a receiver. So where one has died since
                the last version, and too few are left: the next ``send`` waits for another in its place.
            TransferIncomplete: the group took it, and some receivers were lost after that.
            TransferTimeout: not enough receivers came.
            UsageError: the tensors cannot be sent: two have one name, for example. Or the version before is being sent.
                Nobody was told of the version.
            Exception: the source failed. Nobody has the version.
        """
        if version is None:
            raise UsageError("a version has a name, a str or an int; found None")
        check_version(version)
        check_flags(wait=wait, show_progress=show_progress)
        if receivers is not None:
            check_count(1, receivers=receivers)
        with ExitStack() as stack:
            stack.enter_context(self._alone())
            source = stack.enter_context(_opened(tensors, manifest))
            _check_bare(source)
            send = partial(self._send, source, version, receivers, show_progress)
            if wait is not False:
                return send()
            queued = _queued(source)
            return self._begin(send, stack.pop_all(), version, queued)

    @signals.held
    def _begin(
        self, send: Callable[[], SendReport], opened: ExitStack, version: str | int, queued: devices.Event | None
    ) -> SendHandle:
        """Send in a thread, which closes what was opened."""

        def run() -> SendReport:
            with opened:
                if queued is not None:
                    devices.wait(queued.query, None, lambda: self._closed)
                return send()

        try:
            self._thread = None  # Not this one any more: ``close`` waits for the other.
            sending = SendHandle(run, version)
            self._beside = sending.thread
            return sending
        except BaseException as error:
            opened.close()
            if isinstance(error, RuntimeError):
                raise TransferError(f"version {version!r} was not sent: {error}; wait=True needs no thread") from error
            raise

    @alone_in_a_fork()
    @signals.held
    def _send(
        self, source: Source, version: str | int, receivers: int | None, show_progress: bool | None
    ) -> SendReport:
        self._thread = threading.get_ident()
        timeline = Timeline()
        with timeline.event("wait for receivers"):
            count = self._receivers if receivers is None else receivers
            self._group.gather(count, drop=self._drop, meanwhile=self._tell)
            doubts = self._settle()
            members = self._group.gather(count, drop=self._drop)
        # Larger than that of any lead that somebody here has had.
        self._epoch = max(self._epoch, 1, *(peer.epoch + (peer.epoch > self._epoch) for peer in members))
        self._update += 1
        with progress("sending", source.manifest.nbytes, show=show_progress) as advance:
            outbound = Outbound(
                self._group,
                members,
                self._slots,
                update=self._update,
                timeout=self._timeout,
                digests=self._digests,
                drop=self._drop,
                register=self._register,
                epoch=self._epoch,
                advance=advance,
                timeline=timeline,
            )
            try:
                report = outbound.run(source, version)
            finally:
                self._remember(outbound)
        return replace(report, warnings=(*doubts, *warnings_of(source)))

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
            self._group.wait(self._group.peers, left(deadline), listen=True)

    def _tell(self, ready: list[Peer]) -> None:
        tell(ready, self._decided)

    def _remember(self, outbound: Outbound) -> None:
        """For who comes back in doubt."""
        if outbound.decided is not None:
            self._decided[self._update] = outbound.decided
        while len(self._decided) > _REMEMBERED:
            del self._decided[min(self._decided)]

    @property
    @signals.watched
    def connected(self) -> tuple[str, ...]:
        """The names of the receivers that are connected now; one that has died is not among them. Never waits.

        Raises:
            UsageError: this sender is sending, or is another process's.
            Closed: it was closed.
        """
        with self._alone():
            connected = self._group.connected()
            tell(connected, self._decided)
            return tuple(peer.name for peer in connected)

    def close(self) -> None:
        """Let go of the address and the memory. May be called twice, and by any thread.

        A running ``send`` is aborted. When its own thread calls this, from a signal handler or from the source, this
        returns at once, and ``send`` lets go when it ends.
        """
        if self._process != os.getpid():  # A forked child owns nothing of it, and a lock may never be let go there.
            return
        self._closed = True
        self._group.stop()
        if self._thread == threading.get_ident():  # It would wait for itself.
            return
        with self._sending:  # Not for long: every wait of the running send has ended.
            self._group.close()
            self._slots.close()
        beside = self._beside
        if beside is not None and beside is not threading.current_thread():
            beside.join(LAST_LINES)

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Sender at {self.address}: {'closed' if self._closed else f'{len(self._group.peers)} receivers'}>"

    @contextmanager
    @signals.held
    def _alone(self) -> Iterator[None]:
        if self._process != os.getpid():
            raise UsageError(f"this sender is process {self._process}'s, which forked this one; send there")
        if not self._sending.acquire(blocking=False):
            if self._closed:
                raise Closed("this sender was closed")
            raise UsageError("this sender is sending; one version at a time")
        try:
            if self._closed:
                raise Closed("this sender was closed")
            self._thread = threading.get_ident()
            yield
        finally:
            self._thread = None
            self._sending.release()
            if self._closed:
                self.close()


@contextmanager
@signals.held
def _opened(tensors: Sendable, manifest: Manifest | None) -> Iterator[Source]:
    """What is to be sent, as a source; one that is made here is closed here."""
    if not is_pairs(tensors):
        with opened(as_saved(tensors) if isinstance(tensors, nn.Module) else tensors) as source:
            yield source
    elif manifest is not None:
        with from_iterator(tensors, manifest) as promised:
            yield promised
    else:
        with StateSource(_collected(tensors)) as state:
            yield state


def _queued(source: Source) -> devices.Event | None:
    """What computes the tensors may be queued still, on a stream of this thread. Other threads do not wait for that."""
    if not isinstance(source, InMemory):
        return None
    return devices.record_events({source.borrow(name).device for name in source.manifest})


def _collected(pairs: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors by name; no copies."""
    tensors: dict[str, torch.Tensor] = {}
    twice = set()
    for name, tensor in pairs_of(pairs):
        if name in tensors:
            twice.add(name)
        tensors[name] = tensor
    if twice:
        raise UsageError(f"two tensors have one name: {some(sorted(twice))}")
    return tensors


def _check_bare(source: Source) -> None:
    """Wrappers are refused before anybody is told of the version; in a stream they are met later."""
    check_whole(source.manifest)
    if isinstance(source, InMemory):
        tensors = ((name, source.borrow(name)) for name in source.manifest)
        if wrappers := {name: tensor for name, tensor in tensors if is_wrapper(tensor)}:
            raise UsageError(f"cannot send {some(list(wrappers))}: {wrapped(next(iter(wrappers.values())))}")
