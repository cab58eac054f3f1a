"""What verl's vLLM workers do when its default checkpoint engine pushes weights (``update_weights_from_ipc``)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from verl.workers.rollout.vllm_rollout import utils
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from vllm.logger import init_logger

from ..errors import UsageError
from ..sources.pairs import Pair
from .pushed import PushedUpdate
from .vllm.attached import attached
from .vllm.pushing import take_pushed
from .watched import watched_context

_LOG = init_logger("vllm.hotweights")


def take_over() -> None:
    """Let verl's workers take versions all or nothing, if their model was loaded by us. Twice does nothing."""
    extension = utils.vLLMColocateWorkerExtension
    theirs = extension.update_weights_from_ipc
    if getattr(theirs, "of_hotweights", False):
        return

    def update_weights_from_ipc(
        self: Any, peft_config: Mapping[str, Any] | None = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        if attached(self.get_model()) is None or (peft_config and base_sync_done):  # An adapter, not the model.
            theirs(self, peft_config=peft_config, base_sync_done=base_sync_done, use_shm=use_shm)
        else:
            _update(self, use_shm)

    update_weights_from_ipc.of_hotweights = True  # type: ignore[attr-defined]
    extension.update_weights_from_ipc = update_weights_from_ipc


def _update(worker: Any, use_shm: bool) -> None:
    def receive(pushed: PushedUpdate) -> None:
        if problem := _unfit(worker):
            pushed.fail(problem)
        receiver = BucketedWeightReceiver(worker._get_zmq_handle(), worker.device, use_shm)
        receiver.zmq_context = watched_context()  # A trainer that dies would be waited for for ever.
        # The sender is answered whatever comes of it: it would wait for ever, too.
        receiver.receive_weights(lambda weights, _: pushed.feed(map(_bare, weights)))

    if worker._use_mtp_drafter_weight_sync():
        _LOG.warning("hotweights: the draft model keeps its weights, so less of what it proposes is accepted")
    take_pushed(worker, receive)


def _unfit(worker: Any) -> UsageError | None:
    """Why a worker cannot be updated though its model can."""
    by_verl = os.environ.get("VERL_VLLM_FP8_QUANT_ENABLED") == "1"
    if by_verl or getattr(worker, "_is_qat_model", False) or getattr(worker, "_is_modelopt_qat", False):
        return UsageError(
            "verl quantises this model itself and patches its layers; use rollout.quantization=null and no qat, or "
            "another load format than hotweights"
        )
    return None


def _bare(pair: Pair) -> Pair:
    """A pair by the name that it has in a checkpoint: bases of adapters are called otherwise."""
    name, tensor = pair
    return name.replace(".base_layer.", "."), tensor
