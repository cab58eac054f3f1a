"""Backend: the workers' end of vLLM's weight transfer. It takes what a ``Trainer`` sends; ``trainer.py`` is that end.

vLLM makes one in each worker, for ``--weight-transfer-config '{"backend": "hotweights"}'``, and calls it from
``collective_rpc``. That reads the ranks' answers up to the first failure and leaves the others in their queues, where
the next call takes them for its own. So nothing here raises: what fails is told to the trainer through the transport,
and kept for ``hotweights_status``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.logger import init_logger

from ...errors import TransferTimeout, UsageError
from ...sources.contracts import refusing
from ...transfer.receiver import Receiver
from .attached import as_loaded, attached, stale_draft, updatable
from .projection import LEFT_ALONE, projections
from .ranks import Ranks, words_of
from .receiving import receiver_of

_LOG = init_logger("vllm.hotweights")

OPEN = "in an open session"
"""Stands in the name of a receiver whose worker is in an update that was begun and not finished."""


def register_backend() -> None:
    """Make it known to vLLM; twice does nothing."""
    if "hotweights" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("hotweights", __name__, Backend.__name__)


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM is not installed where types are checked.
    """Where the trainer is.

    Attributes:
        address: of its ``hotweights.Sender``, or several.
        timeout: seconds that each single wait for it may take.
        keys: the directory of the job's keys, unless the engine's own options say where it has them.
        insecure: go without keys in a network.
        answers: whether the sender says welcome while the workers are told of it, as a ``Trainer`` sees to.
        problem: what was wrong with what the trainer said.
    """

    address: str | list[str]
    timeout: float = 60.0
    keys: str | None = None
    insecure: bool = False
    answers: bool = False
    problem: str = ""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Which version comes; any, if that is ``None``."""

    version: str | int | None = None


class Backend(WeightTransferEngine):  # type: ignore[misc]
    """Takes versions in one worker.

    Attributes:
        refused: why the last version was not taken; ``None`` if it was.
        is_open: whether an update was begun and not finished.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: nn.Module) -> None:
        """Raises ``UsageError``, which ends the engine's start, if the model is not ours."""
        super().__init__(config, vllm_config, device, model)
        if attached(model) is None:
            raise UsageError(
                "the weight-transfer backend 'hotweights' updates models that hotweights has loaded; start the engine "
                "with --load-format hotweights"
            )
        self._rank = Ranks().rank
        self._receiver: Receiver | None = None
        self._problem = ""  # with what the trainer said of itself
        self.refused: str | None = None
        self.is_open = False

    def parse_init_info(self, init_dict: Mapping[str, Any]) -> InitInfo:
        """The info; what is wrong with it is kept, and the first version refused with it."""
        try:
            info: InitInfo = super().parse_init_info(init_dict)
        except ValueError as error:
            address = init_dict.get("address") if isinstance(init_dict, Mapping) else init_dict
            info = InitInfo(str(address), problem=str(error))
        return info

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Connect to a trainer, instead of the one before."""
        self.shutdown()
        self._problem = init_info.problem
        with self._refusing(f"the trainer at {init_info.address}"):
            # The trainer reads in the name that it has a session to finish: one that died may have left it.
            name = f"rank {self._rank}" + (f" {OPEN}" if self.is_open else "")
            # A trainer that is not there any more will not come back: a new one calls this again.
            receiver = self._receiver = receiver_of(
                self.vllm_config,
                init_info.address,
                name=name,
                timeout=init_info.timeout,
                keys=init_info.keys,
                insecure=init_info.insecure,
                reconnect=False,
            )
            if not init_info.answers:
                receiver.poll()
            elif not receiver.connect(init_info.timeout):
                raise TransferTimeout(f"{receiver.address} did not answer within {init_info.timeout:g} s")

    def start_weight_update(self) -> None:
        """Begin a session. The model is not touched before all of a version has come."""
        self.is_open = True

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        """Take one version if all receivers of the trainer do. Returns in any case, see ``refused``."""
        version = update_info.get("version") if isinstance(update_info, Mapping) else update_info
        with self._refusing(f"version {version!r}"):
            self.receive_weights(self.parse_update_info(update_info))
            if torch.accelerator.is_available():  # The base class synchronises also where there is none.
                torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Take one version if all receivers of the trainer do.

        Raises:
            HotweightsError: the version was not taken; the model is as it was.
        """
        receiver = self._receiver
        if receiver is None:
            raise UsageError("no trainer has called init_weight_transfer_engine, or not with an address of a sender")
        with refusing(receiver):
            offered = (receiver.manifest, receiver.version)[1]  # The manifest waits for the offer.
            if update_info.version not in (None, offered):
                raise UsageError(f"version {offered!r} came, not {update_info.version!r}")
            if self._problem:
                raise UsageError(self._problem)
            live = updatable(self.model, self.vllm_config)
            with as_loaded(live.model, self.vllm_config):
                report = live.update(receiver, show_progress=False)
        self.refused = None
        _LOG.info("hotweights: version %r is live", report.version)
        beside = [LEFT_ALONE] if projections(self.model) else []
        for warning in (*report.warnings, *beside, *stale_draft(self.vllm_config)):
            _LOG.warning("hotweights: %s", warning)

    def finish_weight_update(self) -> None:
        """End the session. Nothing is done here that could fail: the worker would keep it open for ever."""
        self.is_open = False

    def shutdown(self) -> None:
        """Let go of the trainer. May be called twice."""
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.close()

    @contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        """What fails inside is kept and not raised."""
        try:
            yield
        except Exception as error:
            self.refused = words_of(error)
            _LOG.warning("hotweights: rank %d did not take %s: %s", self._rank, what, self.refused)
