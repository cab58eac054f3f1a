"""What verl's vLLM workers do when its trainer pushes an adapter (LoRA that is not merged): all take it, or none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from verl.utils.vllm import TensorLoRARequest
from verl.workers.rollout.vllm_rollout.utils import VLLM_LORA_INT_ID, VLLM_LORA_NAME, VLLM_LORA_PATH
from vllm.logger import init_logger
from vllm.model_executor.models.utils import WeightsMapper

from ..errors import UsageError
from ..sources.pairs import Pair
from ..text import some
from .vllm.ranks import Ranks, words_of

_LOG = init_logger("vllm.hotweights")

Tensors = dict[str, Tensor]

_A, _B = re.compile(r"lora_(embedding_)?A"), re.compile(r"lora_(embedding_)?B")


def take_adapter(
    worker: Any, peft_config: Mapping[str, Any], receive: Callable[[Callable[[Iterable[Pair]], None]], None]
) -> None:
    """Put an adapter in place of the one before. Every rank must call this.

    Args:
        worker: vLLM's, which keeps the adapter on the host.
        peft_config: verl's words for it.
        receive: hands over what is pushed, until everything came.

    Raises, on the last rank only, see ``take_pushed``:
        UsageError: no rank has the new adapter; all have the one before.
    """
    ranks, tensors = Ranks(), Tensors()
    # Of a new base vLLM has none: that removes all adapters.
    kept = VLLM_LORA_INT_ID in worker.list_loras()
    before: TensorLoRARequest | None = getattr(worker, "_hotweights_adapter", None) if kept else None
    request, problem = None, None
    try:
        receive(lambda pairs: tensors.update((name, tensor.to("cpu", copy=True)) for name, tensor in pairs))
        _check(tensors, before)
        request = _request(peft_config, tensors)
        worker.add_lora(request)
    except Exception as error:
        problem = words_of(error)
    try:
        ranks.agree(problem)
    except Exception as error:
        _restore(worker, before)
        _LOG.warning("hotweights: rank %d did not take an adapter: %s", ranks.rank, error)
        if ranks.rank == ranks.size - 1:
            has = "no adapter" if before is None else "the adapter before"
            raise UsageError(f"the engine did not take the adapter, and has {has}: {error}") from error
        return
    worker._hotweights_adapter = request
    _LOG.info("hotweights: an adapter of %d tensors is live", len(tensors))


def mend_names() -> None:
    """Let verl 0.9.1 find what it reads the names of adapters with: vLLM has renamed it since 0.25."""
    if not hasattr(WeightsMapper, "get_unstacked_mapper") and hasattr(WeightsMapper, "get_rename_mapper"):
        WeightsMapper.get_unstacked_mapper = WeightsMapper.get_rename_mapper


def _request(peft_config: Mapping[str, Any], tensors: Tensors) -> TensorLoRARequest:
    # In place: it is read and checked before the one before goes.
    return TensorLoRARequest(
        lora_name=VLLM_LORA_NAME,
        lora_int_id=VLLM_LORA_INT_ID,
        lora_path=VLLM_LORA_PATH,
        load_inplace=True,
        peft_config=peft_config,
        lora_tensors=tensors,
    )


def _restore(worker: Any, before: TensorLoRARequest | None) -> None:
    if before is None:
        worker.remove_lora(VLLM_LORA_INT_ID)
    else:
        worker.add_lora(before)


def _check(tensors: Tensors, before: TensorLoRARequest | None) -> None:
    """See that all came: vLLM takes what it is given for the whole adapter, and fills up with zeros.

    Raises:
        UsageError: a half of a pair is missing, or what the adapter before had; or a shape is another one.
    """
    if not tensors:
        raise UsageError("the adapter has no tensor; see target_modules of the trainer's model")
    last = {} if before is None else before.lora_tensors
    halves = {_partner(name) for name in tensors}
    if missing := sorted((halves | last.keys()) - tensors.keys()):
        raise UsageError(f"tensors of the adapter are missing: {some(missing)}; send all of it, under the same names")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [
        f"{name}: {shapes[name]} beside {shapes[_partner(name)]}"
        for name in tensors
        if _A.search(name) and shapes[name][0] != shapes[_partner(name)][-1]
    ]
    wrong += [
        f"{name}: {shapes[name]}, and {tuple(tensor.shape)} before"
        for name, tensor in last.items()
        if shapes[name] != tensor.shape
    ]
    if wrong:
        raise UsageError(f"shapes of the adapter do not fit: {some(wrong)}")


def _partner(name: str) -> str:
    """The other half of a pair; of what is in none, itself."""
    is_first = _A.search(name)
    return _A.sub(r"lora_\1B", name) if is_first else _B.sub(r"lora_\1A", name)
