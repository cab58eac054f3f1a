"""Trainer: the trainer's end of vLLM's weight transfer, and what it is made of; ``Backend`` is the workers' end."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed
from torch import nn
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    materialize_full_tensor,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from ...arguments import check_version
from ...errors import TransferError, TransferIncomplete, TransferTimeout, UsageError
from ...manifest import Manifest, TensorSpec
from ...model.as_saved import as_saved
from ...sources.pairs import Pair
from ...text import some
from ...transfer.endpoint import check_connectable, is_local, settled
from ...transfer.report import SendReport
from ...transfer.sender import Sender
from .backend import OPEN
from .receiving import is_address

_LOOK = 0.02
"""Seconds between two looks at who has connected."""
_LATE = 5.0
"""Seconds that what engines on other hosts have begun may take: a connection for bytes, and a relay's word."""
_ALONE = (
    "An engine takes weights from one trainer. If another has connected to it since, or it was started anew: end the "
    "other, and make this trainer anew."
)


def register_trainer() -> None:
    """Make it known to vLLM's factory; twice does nothing."""
    if "hotweights" not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine("hotweights", __name__, Trainer.__name__)


@dataclass
class TrainerInit(TrainerInitInfo):  # type: ignore[misc]  # vLLM is not installed where types are checked.
    """What ``WeightTransferTrainerFactory.trainer_init`` makes a ``Trainer`` of.

    Attributes:
        rank: of this process among the trainer's; rank 0 sends.
        receivers: how many workers take part, of all engines together: ``GET /get_world_size`` of each. By default the
            client is asked, which must be one of ours then.
        address: ``unix:PATH``, or ``tcps://HOST:PORT`` for engines on other hosts, ``ray:NAME`` or ``env:``; by default
            a path in a new folder in the directory for temporary files. Of several, workers use a path that is there on
            their host, of this trainer or of a relay.
        timeout: seconds that each single wait of either end may take.
        collect: whether all tensors are read before an engine is asked, and kept on the host. A source that is slow,
            because it gathers from many ranks, does not hold up the engines then.
        keys: the directory of the job's keys, for ``tcps:``. Engines use the same path, unless their
            ``model_loader_extra_config`` has ``keys``.
        insecure: go without keys in a network where anybody may send and take weights.
    """

    backend: ClassVar[str] = "hotweights"
    receivers: int | None = None
    address: str | Sequence[str] | None = None
    timeout: float = 60.0
    collect: bool = False
    keys: str | os.PathLike[str] | None = None
    insecure: bool = False


class Trainer(TrainerWeightTransferEngine):  # type: ignore[misc]
    """Sends versions to all workers of one or several engines: all take a version, or none does."""

    init_info_cls = TrainerInit

    def __init__(self, init_info: TrainerInit, client: Any, source: Any) -> None:
        super().__init__(client=client, source=source, is_sender=init_info.is_sender)
        self._collect, self._timeout = init_info.collect, init_info.timeout
        self._count = 0
        self._sender: Sender | None = None
        self._folder: str | None = None

    @classmethod
    def trainer_init(
        cls, init_info: TrainerInit, *, client: Any, source: Any = None, rank: int | None = None
    ) -> Trainer:
        """Connect to the engines, on rank 0.

        Args:
            init_info: how.
            client: makes vLLM's four calls to the engines: vLLM's own for HTTP or Ray, ours, or another.
            source: a ``WeightSource``, such as vLLM's ``ModuleSource(model)``; or the model itself. Of transformers'
                models then goes what ``save_pretrained`` would write, which vLLM knows in each case.
            rank: unused; vLLM 0.33 may give it.

        Raises:
            UsageError: something is missing.
            TransferError: the workers did not connect.
        """
        if source is None:
            raise UsageError("a trainer needs a source: the model, or a WeightSource such as ModuleSource(model)")
        trainer = cls(init_info, client, source)
        if trainer.is_sender:
            try:
                trainer._connect(init_info)
            except BaseException:
                trainer.shutdown()
                raise
        return trainer

    def send_weights(self, version: str | int | None = None) -> SendReport | None:
        """Give the engines what the source has now. All ranks of the trainer call it; rank 0 sends.

        Args:
            version: its name, also in vLLM's outputs; by default the number of calls.

        Returns:
            On rank 0 what was sent.

        Raises, on rank 0:
            TransferAborted: no worker has it; each problem begins with a worker's name. Engines go on with what they
                had, and the next version may be sent.
            TransferIncomplete: the workers took it, and some were lost after that.
            TransferTimeout: workers are missing.
            Exception: the source failed, or an engine could not be asked. No worker has it.
        """
        manifest, pairs = _stream(self.source)
        if self._sender is None:
            _exhaust(pairs)  # Its ranks read together, tensor by tensor.
            return None
        self._count += 1
        name = self._count if version is None else version
        check_version(name)
        if self._collect:
            pairs = iter([(called, tensor.detach().to("cpu", copy=True)) for called, tensor in pairs])
        with self._session(name):
            return self._sent(self._sender, manifest, pairs, name)

    def shutdown(self) -> None:
        """Let go of the workers and of the address. May be called twice."""
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _connect(self, init_info: TrainerInit) -> None:
        receivers = init_info.receivers
        if receivers is None:
            if not hasattr(self.client, "world_size"):
                raise UsageError(
                    "receivers= is missing: how many workers take part, of all engines together; GET /get_world_size "
                    "of each server says it"
                )
            receivers = self.client.world_size()
        address = init_info.address
        if address is None:
            self._folder = tempfile.mkdtemp(prefix="hotweights-")
            address = f"unix:{Path(self._folder) / 'trainer'}"
        if not all(map(is_address, [address] if isinstance(address, str) else address)):
            raise UsageError(f"engines connect to unix:PATH or tcps://HOST:PORT; address= is {address!r}")
        keys, insecure = init_info.keys, init_info.insecure
        if isinstance(address, str):
            address, keys = settled(address, keys)  # Engines have another environment.
        sender = self._sender = Sender(
            address, receivers=receivers, timeout=init_info.timeout, keys=keys, insecure=insecure
        )
        listening = sender.address if isinstance(address, str) else sender.address.split(", ")
        for each in [listening] if isinstance(listening, str) else listening:
            check_connectable(each)  # Engines would refuse it, one by one.
        told: dict[str, Any] = {"address": listening, "timeout": init_info.timeout, "answers": True}
        if keys is not None or insecure:
            told |= {"keys": None if keys is None else os.path.abspath(keys), "insecure": insecure}
        patience = 0.0 if is_local(listening) else min(_LATE, init_info.timeout)
        clients = getattr(self.client, "clients", [self.client])
        for client in clients:
            before = {*sender.connected}
            _answering(sender, _Call(partial(client.init_weight_transfer_engine, told)))
            expected = receivers if len(clients) == 1 else client.world_size() if hasattr(client, "world_size") else 1
            _await(sender, len(before) + expected, patience)
            # A trainer that died in an update could not finish it, and vLLM begins no other before that.
            if any(OPEN in name for name in {*sender.connected} - before):
                client.finish_weight_update()
        _await(sender, receivers, patience)
        if len(sender.connected) < receivers:
            raise TransferError(
                f"{len(sender.connected)} of {receivers} workers connected to {sender.address}: "
                f"{list(sender.connected)}; a unix: address is for engines on this host that run as this user, tcps: "
                "for others; the engines' logs say what else failed"
            )

    @contextmanager
    def _session(self, name: str | int) -> Iterator[None]:
        """Begin an update in the engines, and finish it in any case; with the version's name only if it was taken."""
        self.client.start_weight_update()
        try:
            yield
        except TransferIncomplete as error:
            self._finish(error, str(name))
            raise
        except BaseException as error:
            self._finish(error)
            raise
        self.client.finish_weight_update(str(name))

    def _finish(self, error: BaseException, *name: str) -> None:
        """Finish what failed. What fails here too is added to the error that came first."""
        try:
            self.client.finish_weight_update(*name)
        except Exception as second:
            error.add_note(
                f"the update could not be finished either: {second!r}; make a new trainer before the next one"
            )

    def _sent(self, sender: Sender, manifest: Manifest, pairs: Iterator[Pair], name: str | int) -> SendReport:
        asked = _Call(lambda: self.client.update_weights({"version": name}))
        try:
            # The sender closes what it is given; ``pairs`` must stay open, see below.
            given = (pair for pair in pairs)
            report = sender.send(given, version=name, manifest=manifest, show_progress=False)
        except BaseException as error:
            if isinstance(error, TransferTimeout) and not sender.connected:
                error.advice = _ALONE
            if isinstance(error, Exception) and torch.distributed.is_initialized():
                with suppress(Exception):
                    _exhaust(pairs)  # The other ranks of the trainer read on, and would wait for this one.
            if (failure := asked.failure(self._timeout)) is not None:
                error.add_note(f"the call that asked the engines to take it failed: {failure!r}")
            raise
        if (failure := asked.failure(self._timeout)) is not None:
            raise TransferIncomplete(
                f"version {name!r} was taken, and the call that asked for it failed: {failure!r}",
                committed=report.committed,
            ) from failure
        return report


def _answering(sender: Sender, call: _Call) -> None:
    """Have the sender welcome whoever connects, until the call has returned.

    Raises:
        Exception: what the call raised.
    """
    while call.runs(_LOOK):
        _ = sender.connected
    if (failure := call.failure(0)) is not None:
        raise failure


def _await(sender: Sender, receivers: int, seconds: float) -> None:
    """Wait until so many are connected: a connection over the network is there a little later than who made it."""
    late = time.monotonic() + seconds
    while len(sender.connected) < receivers and time.monotonic() < late:
        time.sleep(_LOOK)


class _Call:
    """A call that another thread makes."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="hotweights-update-weights", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._act()
        except BaseException as error:
            self._failure = error

    def runs(self, seconds: float) -> bool:
        """Whether it has not ended within these seconds."""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def failure(self, seconds: float) -> BaseException | None:
        """How it failed, if it did. It has ended when this returns, or did not within these seconds."""
        return TimeoutError(f"it did not return within {seconds:g} s") if self.runs(seconds) else self._failure


def _stream(source: Any) -> tuple[Manifest, Iterator[Pair]]:
    """What a source promises, and its tensors; vLLM 0.33 has given both other names."""
    if isinstance(source, nn.Module):
        saved = as_saved(source)
        state = saved.state_dict() if isinstance(saved, nn.Module) else saved
        specs = (TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items())
        return Manifest(specs), ((name, materialize_full_tensor(tensor)) for name, tensor in state.items())
    promised = source.metadata() if callable(source.metadata) else source.metadata
    held = source.held_names() if hasattr(source, "held_names") else None
    elsewhere = [meta.name for meta in promised if 0 not in (getattr(meta, "owners", None) or (0,))]
    elsewhere += [] if held is None else [meta.name for meta in promised if meta.name not in held]
    if hasattr(source, "implements_iter_full") and not source.implements_iter_full():
        raise UsageError(
            f"rank 0 sends whole tensors, and {type(source).__name__} has pieces of them only (iter_local); use one "
            "that has iter_full, such as ModuleSource"
        )
    if elsewhere:
        raise UsageError(
            f"rank 0 sends whole tensors, and this source does not gather all of them there: {some(elsewhere)}; use "
            "one that does, such as ModuleSource"
        )
    promises = (TensorSpec(meta.name, meta.dtype, tuple(meta.shape)) for meta in promised)
    return Manifest(promises), source.iter_full() if hasattr(source, "iter_full") else iter(source)


def _exhaust(pairs: Iterable[Pair]) -> None:
    for _ in pairs:
        pass
