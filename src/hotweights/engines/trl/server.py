"""Communicator: a trainer's end to one server of vLLM. It stands where TRL keeps its NCCL group."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from ...errors import UsageError
from ...sources.pairs import Pair
from ..vllm.clients import HTTPClient
from ..vllm.engine import Mode
from ..vllm.trainer import Trainer, TrainerInit, register_trainer
from .sync import Sync, SyncOptions

Told = tuple[str, str, Sequence[int]]
"""What TRL says of a tensor before it comes: its name, the name of its dtype, and its shape."""

_SERVE = """start it with VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --load-format hotweights \
--weight-transfer-config '{"backend": "hotweights"}'"""


@dataclass(frozen=True, slots=True)
class _Meta:
    """As vLLM's sources have it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Given:
    """What a trainer gives for one version; of ``WeightSource`` the part that is read."""

    def __init__(self) -> None:
        self.promised: list[_Meta] = []
        self.pairs: Iterator[Pair] = iter(())

    def metadata(self) -> list[_Meta]:
        return self.promised

    def __iter__(self) -> Iterator[Pair]:
        return self.pairs


class Communicator:
    """Sends versions to all workers of a server: all take one, or none does."""

    def __init__(
        self, url: str, config: Mapping[str, Any], options: SyncOptions, *, mode: Mode | None = "keep"
    ) -> None:
        """Connect to the workers.

        Args:
            url: of the server.
            config: what its ``/server_info`` says.
            options: what ``enable`` was given.
            mode: as ``HTTPClient`` takes it; ``None`` where TRL pauses the server.

        Raises:
            UsageError: the server does not take weights from hotweights.
            TransferError: the workers did not connect.
        """
        _check(url, config)
        register_trainer()
        self._options = options
        self._given = _Given()
        self._client = HTTPClient(url, mode=mode)
        init = TrainerInit(
            rank=0, address=options.address, timeout=options.timeout, keys=options.keys, insecure=options.insecure
        )
        self._trainer: Trainer = WeightTransferTrainerFactory.trainer_init(
            init, client=self._client, source=self._given
        )
        self._count = 0
        self._collected: dict[str, torch.Tensor] | None = None

    def send(self, told: Iterable[Told], pairs: Iterator[Pair]) -> None:
        """Give the server one version; or, between others of a group, note it for the end of that.

        Args:
            told: all tensors that come.
            pairs: they are read one at a time, and in any case to the end: TRL unmerges adapters there, and other
                processes gather with this one.

        Raises:
            TransferAborted, TransferIncomplete, TransferTimeout: as ``Trainer.send_weights``.
        """
        if self._collected is not None:
            self._collected.update((name, tensor.detach().to("cpu", copy=True)) for name, tensor in pairs)
            return
        began = time.monotonic()
        self._given.promised = [_Meta(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in told]
        self._given.pairs = pairs
        self._count += 1
        try:
            report = self._trainer.send_weights(self._count)
        except Exception:
            with suppress(Exception):  # The first is the one to tell.
                _exhaust(pairs)
            raise
        finally:
            self._given.pairs = iter(())
        _exhaust(pairs)
        assert report is not None, "this is rank 0"
        self._options.tell(Sync(self._count, report.nbytes, time.monotonic() - began, self._client.stall_seconds))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside, tensors come one by one, and nobody has said how many; they are one version.

        They are kept on the host until the last has come. If it fails inside, nothing is sent.
        """
        if self._collected is not None:
            raise UsageError("weight_update() is within another weight_update(); each tensor belongs to one version")
        collected = self._collected = {}
        try:
            yield
        finally:
            self._collected = None
        told = [(name, str(tensor.dtype).removeprefix("torch."), tensor.shape) for name, tensor in collected.items()]
        self.send(told, iter(collected.items()))

    def complete(self, act: Callable[[Iterable[Pair]], Iterable[Pair]]) -> None:
        """Let what ``act`` makes of the tensors that were collected stand for them."""
        if self._collected is not None:
            made = list(act(self._collected.items()))
            self._collected.clear()
            self._collected.update(made)

    def close(self) -> None:
        """Let go of the workers. May be called twice."""
        self._trainer.shutdown()


def _check(url: str, config: Mapping[str, Any]) -> None:
    """See that a server takes weights from hotweights."""
    transfer = config.get("weight_transfer_config")
    backend = transfer.get("backend") if isinstance(transfer, Mapping) else None
    if backend != "hotweights":
        found = "no weight transfer" if transfer is None else f"the weight transfer {backend or transfer!r}"
        raise UsageError(f"the vLLM server at {url} has {found}, and this trainer sends by hotweights; {_SERVE}")


def _exhaust(pairs: Iterable[Pair]) -> None:
    for _ in pairs:
        pass
