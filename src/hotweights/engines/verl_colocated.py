"""What verl's vLLM workers do when its default checkpoint engine pushes weights (``update_weights_from_ipc``).

And what they do when ours, with ``direct``, tells them where to take them (``hotweights_take``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from verl.workers.rollout.vllm_rollout import utils
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from vllm.logger import init_logger

from ..errors import UsageError
from ..live.report import UpdateReport
from ..sources.pairs import Pair
from ..transfer.receiver import Receiver
from .pushed import PushedUpdate
from .verl_adapter import mend_names, take_adapter
from .vllm.attached import attached
from .vllm.pushing import begun, take_pushed
from .vllm.ranks import Ranks, words_of
from .vllm.receiving import receiver_of
from .vllm.tied_head import twin_of_head
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
        if attached(self.get_model()) is None:
            theirs(self, peft_config=peft_config, base_sync_done=base_sync_done, use_shm=use_shm)
        elif peft_config and base_sync_done:
            take_adapter(self, peft_config, partial(_receive, self, use_shm))
        else:
            _update(self, use_shm)

    update_weights_from_ipc.of_hotweights = True  # type: ignore[attr-defined]
    extension.update_weights_from_ipc = update_weights_from_ipc
    mend_names()
    extension.hotweights_take = hotweights_take


def hotweights_take(
    worker: Any, name: str, address: str, timeout: float, keys: str | None = None, insecure: bool = False
) -> None:
    """Take the next version of a trainer's sender, if all of its receivers do. Every rank must be asked.

    Raises, on the last rank only, see ``take_pushed``:
        Exception: no receiver has the version.
    """
    ranks = Ranks()
    try:
        how: dict[str, Any] = {"timeout": timeout, "keys": keys, "insecure": insecure, "reconnect": False}
        with receiver_of(worker.vllm_config, address, name=f"{name} rank {ranks.rank}", **how) as receiver:
            report = _taken(worker, receiver)
    except Exception as error:
        _LOG.warning("hotweights: rank %d did not take what %s sent: %s", ranks.rank, address, words_of(error))
        if ranks.rank == ranks.size - 1:
            raise
        return
    if hasattr(worker.model_runner, "reset_lora_state"):
        worker.model_runner.reset_lora_state()
    _LOG.info("hotweights: version %r is live", report.version)


def _taken(worker: Any, receiver: Receiver) -> UpdateReport:
    _tell_of_draft(worker)
    twins = partial(twin_of_head, worker.model_config)
    with ExitStack() as decision:

        def agree(problem: Exception | None) -> None:
            if problem is not None:
                raise problem
            decision.enter_context(receiver.decision())

        with PushedUpdate(partial(begun, worker), agree=agree, twins=twins) as pushed:
            receiver.wanted(receiver.manifest)  # It decides, though it takes all.
            if problem := _unfit(worker):
                pushed.fail(problem)
            pushed.feed_or_raise([])
            with receiver.leases() as leases:
                for lease in leases:
                    pushed.feed_or_raise([_bare((lease.name, lease.tensor))])
            return pushed.finish(receiver.version)


def _update(worker: Any, use_shm: bool) -> None:
    def receive(pushed: PushedUpdate) -> None:
        if problem := _unfit(worker):
            pushed.fail(problem)
        _receive(worker, use_shm, lambda pairs: pushed.feed(map(_bare, pairs)))

    _tell_of_draft(worker)
    take_pushed(worker, receive)


def _receive(worker: Any, use_shm: bool, take: Callable[[Iterable[Pair]], None]) -> None:
    """Give all that verl's sender pushes to ``take``, which must not raise: the sender would wait for ever."""
    receiver = BucketedWeightReceiver(worker._get_zmq_handle(), worker.device, use_shm)
    receiver.zmq_context = watched_context()  # A trainer that dies would be waited for for ever.
    receiver.receive_weights(lambda pairs, _: take(pairs))


def _tell_of_draft(worker: Any) -> None:
    if worker._use_mtp_drafter_weight_sync():
        _LOG.warning("hotweights: the draft model keeps its weights, so less of what it proposes is accepted")


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
