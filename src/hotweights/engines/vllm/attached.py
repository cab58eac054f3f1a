"""The live model that belongs to a model of vLLM's: kept on the model itself, and what it needs to be updated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ... import signals
from ...errors import UsageError
from ...live.model import LiveModel
from ...live.state import State

if TYPE_CHECKING:  # It imports vLLM.
    from .layers import Wrapped


class _Attached:
    """Holds a live model where walks over a model's attributes do not find it: it leads back to the whole model."""

    __slots__ = ("live",)

    def __init__(self, live: LiveModel) -> None:
        self.live = live


def attach(model: nn.Module, live: LiveModel) -> None:
    """Keep the live model as long as the model."""
    model.__dict__["_hotweights"] = _Attached(live)


def attached(model: nn.Module) -> LiveModel | None:
    """The live model of a model, if it was loaded by us."""
    holder = model.__dict__.get("_hotweights")
    return holder.live if isinstance(holder, _Attached) else None


def loaded_by_us(model: nn.Module) -> LiveModel:
    """The live model of a model.

    Raises:
        UsageError: it was not loaded by us.
    """
    live = attached(model)
    if live is None:
        raise UsageError(
            "this model was not loaded by hotweights, so it cannot be updated; start the engine with "
            "--load-format hotweights"
        )
    return live


def updatable(model: nn.Module, vllm_config: Any) -> LiveModel:
    """The live model of a model, as it is now.

    Raises:
        UsageError: it cannot be updated; the message says why.
    """
    from .layers import processes_itself

    live = loaded_by_us(model)
    if vllm_config.parallel_config.enable_eplb:
        raise UsageError(
            "this engine moves experts between ranks while it runs, and plans do not know where they are; start it "
            "without enable_eplb"
        )
    if processes_itself(live.model):
        raise UsageError(
            f"{type(live.model).__name__} processes itself as a whole after loading, not layer by layer; start a new "
            "engine with the new weights"
        )
    if live.state not in (State.SERVING, State.IN_DOUBT):
        raise UsageError(f"the model is {live.state.value}; only a model that is {State.SERVING.value} can be updated")
    if sleeps():
        raise UsageError("this engine sleeps, so its weights have no memory; first: wake_up(tags=['weights'])")
    return live


def sleeps() -> bool:
    """Whether vLLM has taken the memory of the weights away, as its sleep mode does from level 1 on."""
    from vllm.device_allocator.cumem import CuMemAllocator

    allocator = CuMemAllocator.instance  # Asking for it would make one.
    return allocator is not None and any(
        data.tag == "weights" and data.is_asleep for data in allocator.pointer_to_data.values()
    )


def stale_draft(vllm_config: Any) -> list[str]:
    """A warning, if speculative decoding has a model of its own: nobody updates it."""
    speculative = getattr(vllm_config, "speculative_config", None)
    if speculative is None or speculative.method in ("ngram", "ngram_gpu", "suffix"):
        return []
    return ["the draft model keeps its weights: it proposes what the version before would say, so less is accepted"]


@contextmanager
@signals.held
def as_loaded(model: nn.Module, vllm_config: Any, wrappers: Wrapped | None = None) -> Iterator[None]:
    """Inside, what processing looks at (vLLM's config, the default dtype, layers) is as it was for the first load.

    Whoever enters it for each tensor gives ``wrapped_by_lora(model)``: it walks the model.
    """
    from vllm.config import set_current_vllm_config
    from vllm.utils.torch_utils import set_default_torch_dtype

    from .layers import without_lora, wrapped_by_lora

    with (
        set_current_vllm_config(vllm_config),
        set_default_torch_dtype(vllm_config.model_config.dtype),
        torch.inference_mode(False),  # Tensors made inside could not be written outside.
        without_lora(wrapped_by_lora(model) if wrappers is None else wrappers),
    ):
        yield
