"""Sender: the trainer's end of a transfer, as its users hold it. Each version that it sends is an ``Outbound``."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, overload

import torch

from .. import signals
from ..arguments import check_choices, check_count, check_flags, check_seconds, check_version
from ..errors import Closed, HotweightsError, TransferError, UsageError
from ..forked import alone_in_a_fork
from ..manifest import Manifest
from ..memory import devices
from ..rename import Rename
from ..sources.contracts import Source, warnings_of
from ..sources.opening import AnySource
from ..timeline import Timeline
from .audience import Audience
from .carriers.table import DEFAULT
from .outbound import Outbound
from .payload import in_memory, payload
from .publication import Publication, check_none_connects
from .report import SendReport
from .send_handle import LAST_LINES, SendHandle
from .sharded.holding import CastTo, Holding, Sharded, holding
from .sharded.rank import Rank
from .sharded.sharded_outbound import ShardedOutbound
from .sharded.tiling import Tiling
from .unwritten import unwritten_check
from .way import Encrypt, OnLost, way_of

Sendable = AnySource | Iterable[tuple[str, torch.Tensor]] | Sharded


class Sender:
    """Sends versions to the receivers that connect to an address. A context manager.

    Bytes go through a few slots of shared memory, filled once for all receivers; those on other hosts are sent what
    they want of each. One version is sent at a time. Between two of them nothing runs, and receivers that connect wait.
    """

    def __init__(
        self,
        address: str | os.PathLike[str] | Sequence[str],
        *,
        receivers: int = 1,
        slots: int = 4,
        slot_nbytes: int | None = None,
        digests: bool = True,
        timeout: float = 60.0,
        on_lost: OnLost = "abort",
        keys: str | os.PathLike[str] | None = None,
        insecure: bool = False,
        decision: str | None = None,
        carrier: str = DEFAULT,
        encrypt: Encrypt = "control",
        keep: int | None = None,
        store: object = None,
        group: Any = None,
        compare_copies: bool = True,
    ) -> None:
        """Take the address. Nobody is waited for yet, but for the other ranks of ``group``.

        Args:
            address: ``unix:PATH``. The directory must be this user's alone; one that does not exist is made so. Or
                ``tcps://HOST:PORT``, for receivers on other hosts; port 0 is one that is free, see ``self.address``.
                Or ``ray:NAME``, in a cluster of Ray; or ``env:`` for what torchrun, Slurm or ``HOTWEIGHTS_ADDRESS``
                says, docs/hosts.md.
                Several: one group of receivers comes to all of them.
                Or where versions are published for whoever looks, docs/objects.md: ``s3://BUCKET/RUN``, another store
                that can be written to, ``file:///DIRECTORY``, or a ``Path``. Whoever published there is replaced.
            receivers: how many must be connected before anything is sent. All that are connected take part.
            slots: pieces of shared memory; two are enough for filling one while another is read.
            slot_nbytes: bytes of each: 4 MiB, so that all of them fit into the CPU's last cache, or 16 MiB where
                receivers may be on other hosts. Larger tensors are split.
            digests: whether receivers compare what they copied with what this side held.
            timeout: seconds that each single wait may take.
            on_lost: what happens to an update when a receiver dies, fails or does not answer, see ``OnLost``.
            keys: the directory of the job's keys, which ``hotweights keys`` makes; for ``tcps:``. With ``ray:`` they
                are handed to receivers; without it new ones are made.
            insecure: go without keys in a network where anybody may send and take weights.
            decision: where decisions are written once: ``file:///DIRECTORY``, which all hosts see at that path,
                ``s3://BUCKET/FOLDER`` or ``etcd://HOST:PORT/PREFIX``. Members that lose this process read it there.
                Without it those on other hosts are in doubt then.
            carrier: how bytes get to other hosts, docs/hosts.md: ``"sockets"``; ``"pg"``, a group of torch.distributed
                for each receiver; or ``"nixl"``. Receivers and relays are told.
            encrypt: what TLS protects between hosts that have keys: ``"control"``, which is all but the weights, or
                ``"all"``; see docs/hosts.md for what that costs. Receivers and relays are told.
            keep: where versions are published: how many stay there, 3 by default; older ones are deleted.
            store: of an address in a store: options, or a store of obstore, see ``hotweights.open``.
            group: the process group of a sharded trainer, each rank of which makes a sender, docs/sharded-trainers.md.
            compare_copies: with ``group``: whether tensors that several ranks hold are compared before they are sent;
                rank 0 says it.

        Raises:
            AddressTaken: another sender is there; the message says which process.
            UsageError: the address or an option is wrong.
            MissingPackage: the carrier needs a package that is not installed.
            TransferTimeout: not all ranks of ``group`` came.
        """
        check_choices(on_lost=(on_lost, OnLost), encrypt=(encrypt, Encrypt))
        check_count(1, receivers=receivers, slots=slots, slot_nbytes=1 if slot_nbytes is None else slot_nbytes)
        check_flags(digests=digests, compare_copies=compare_copies)
        check_seconds(timeout=timeout)
        check_flags(insecure=insecure)
        self._way, self._ranks = way_of(
            address,
            receivers=receivers,
            slots=slots,
            slot_nbytes=slot_nbytes,
            digests=digests,
            timeout=timeout,
            on_lost=on_lost,
            keys=keys,
            insecure=insecure,
            decision=decision,
            carrier=carrier,
            encrypt=encrypt,
            keep=keep,
            store=store,
            group=group,
            compare_copies=compare_copies,
        )
        self.address = self._way.address
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
        rename: Rename | None = None,
        dtype: CastTo | None = None,
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
        rename: Rename | None = None,
        dtype: CastTo | None = None,
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
        rename: Rename | None = None,
        dtype: CastTo | None = None,
        receivers: int | None = None,
        show_progress: bool | None = None,
        wait: bool = True,
    ) -> SendReport | SendHandle:
        """Send one version; return when every receiver has it, or when it is published.

        Tensors are read only while this runs: nobody may change them before it returns. With ``wait=False`` it returns
        at once, and nobody may change them before ``SendHandle.done``.

        Args:
            tensors: a mapping, a module, a source or a path; or pairs of name and tensor. With ``manifest`` pairs are
                sent as they come. Without it they are read to the end first, and all tensors are kept until the return.
                Of a transformers model what ``save_pretrained`` would write is sent. With ``group=`` every rank gives
                what it holds: DTensors, ``Shard``s, and whole tensors, which lie on one rank or on several.
            version: its name; with ``group=`` the same on all ranks.
            manifest: what the pairs will be.
            rename: new names for the tensors, see ``hotweights.load``.
            dtype: with ``group=``: as what floating-point tensors of two bytes or more are sent. Each rank casts what
                it fills a slot with: half the bytes of float32 masters travel, and a worker's own cast gives the same.
            receivers: how many must be connected this time; with ``group=`` rank 0 says it.
            show_progress: whether to draw a progress bar; by default on a terminal or in a notebook.
            wait: whether to wait for the receivers. If not, a thread does, and ``SendHandle.result`` says how it ended.
                What is sent is opened before this returns; only pairs with ``manifest`` are iterated in the thread.

        Raises:
            TransferAborted: nobody has it; each problem begins with the name of a receiver. So where one has died since
                the last version, and too few are left: the next ``send`` waits for another in its place.
            TransferIncomplete: the group took it, and some receivers were lost after that.
            TransferTimeout: not enough receivers came.
            AddressTaken: another sender publishes there now. Workers have its versions.
            SaveError, StoreError: the version could not be published. Workers have the one before.
            UsageError: the tensors cannot be sent: two have one name, for example. Or the version before is being sent.
                Nobody was told of the version. With ``group=`` also: the ranks do not hold all of a tensor, or hold
                some of it twice and differently. Every rank raises what any rank met, in the same words.
            UsageError: tensors were written while they were sent, as far as torch counts it; nobody has the version.
            Exception: the source failed. Nobody has the version.
        """
        if version is None or version == "":
            raise UsageError(f"a version has a name, a str or an int; found {version!r}")
        check_version(version)
        check_flags(wait=wait, show_progress=show_progress)
        if receivers is not None:
            check_count(1, receivers=receivers)
        if isinstance(self._way, Publication):
            check_none_connects(self.address, receivers=(receivers, None))
        with ExitStack() as stack:
            stack.enter_context(self._alone())
            if self._ranks is None:
                if dtype is not None:
                    raise UsageError("dtype= is for a Sender with group=; leave it out: workers cast by themselves")
                source = stack.enter_context(payload(tensors, manifest, rename))
                send = partial(self._send, source, version, receivers, show_progress, unwritten_check(source))
                given: Sequence[torch.Tensor] = in_memory(source)
            else:
                held = self._held(stack, tensors, manifest, rename, dtype, version)
                send = partial(self._send_held, held, version, receivers, show_progress)
                given = held.tensors if isinstance(held, Holding) else ()
            if wait is not False:
                return send()
            queued = devices.record_events({tensor.device for tensor in given})
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
        self,
        source: Source,
        version: str | int,
        receivers: int | None,
        show_progress: bool | None,
        check: Callable[[], object],
    ) -> SendReport:
        self._thread = threading.get_ident()
        if isinstance(self._way, Publication):
            return self._way.send(source, version, Timeline(), check)
        assert isinstance(self._way, Audience)

        def run(outbound: Outbound) -> SendReport:
            return outbound.run(source, version, check)

        report = self._way.offer(
            Outbound,
            run,
            version=version,
            nbytes=source.manifest.nbytes,
            receivers=receivers,
            show_progress=show_progress,
        )
        return replace(report, warnings=(*report.warnings, *warnings_of(source)))

    # With a group.

    @signals.held
    def _held(
        self,
        stack: ExitStack,
        tensors: Sendable,
        manifest: Manifest | None,
        rename: Rename | None,
        dtype: CastTo | None,
        version: str | int,
    ) -> Holding | UsageError:
        """What this rank holds. What is wrong with it all ranks hear of, so it is not raised here."""
        assert self._ranks is not None
        try:
            if manifest is not None:
                raise UsageError("manifest= promises pairs that come one by one; with group= leave it out")
            return stack.enter_context(holding(tensors, rename, self._ranks.place.ranks, dtype))
        except HotweightsError as error:
            return UsageError(str(error))
        except BaseException as error:
            self._ranks.fail(version, error)
            raise

    @alone_in_a_fork()
    @signals.held
    def _send_held(
        self, held: Holding | UsageError, version: str | int, receivers: int | None, show_progress: bool | None
    ) -> SendReport:
        self._thread = threading.get_ident()
        lead, audience = self._ranks, self._way
        if isinstance(lead, Rank):
            return lead.send(version, held)
        assert lead is not None
        assert isinstance(audience, Audience)

        def sending(tiling: Tiling) -> SendReport:
            assert isinstance(held, Holding)
            kind = partial(ShardedOutbound, lead=lead, tiling=tiling, held=held)
            nbytes = sum(spec.nbytes for spec in tiling.specs())
            return audience.offer(
                kind,
                lambda assembly: assembly.give(version),
                version=version,
                nbytes=nbytes,
                receivers=receivers,
                show_progress=show_progress,
            )

        return lead.send(version, held, sending)

    @property
    @signals.watched
    def connected(self) -> tuple[str, ...]:
        """The names of the receivers that are connected now; one that has died is not among them. Never waits.

        A relay stands there once for each of its workers.

        Raises:
            UsageError: this sender is sending, or is another process's.
            Closed: it was closed.
        """
        with self._alone():
            if isinstance(self._way, Publication):
                raise UsageError(f"nobody connects to {self.address}: workers look there, and are not seen")
            return () if isinstance(self._way, Rank) else self._way.connected()

    def close(self) -> None:
        """Let go of the address and the memory. May be called twice, and by any thread.

        A running ``send`` is aborted. When its own thread calls this, from a signal handler or from the source, this
        returns at once, and ``send`` lets go when it ends.
        """
        if self._process != os.getpid():  # A forked child owns nothing of it, and a lock may never be let go there.
            return
        self._closed = True
        self._way.stop()
        if self._ranks is not None:
            self._ranks.stop()
        if self._thread == threading.get_ident():  # It would wait for itself.
            return
        with self._sending:  # Not for long: every wait of the running send has ended.
            self._way.close()
            if self._ranks is not None:
                self._ranks.close()
        beside = self._beside
        if beside is not None and beside is not threading.current_thread():
            beside.join(LAST_LINES)

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Sender at {self.address}: {'closed' if self._closed else self._way.state}>"

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
