"""Projection: the Dense layers of a sentence-transformers checkpoint, which vLLM reads in folders beside the model.

They hang where no walk over the model's modules finds them, and each pooler has its own. No sender brings them.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ...errors import UsageError

LEFT_ALONE = "the Dense layers of sentence-transformers (2_Dense and so on) keep what they had: this source has none"


def projections(model: nn.Module) -> list[nn.Module]:
    """Those of each pooler of a model; of most models there are none."""
    poolers = (pooler for part in model.modules() for pooler in getattr(part, "poolers_by_task", {}).values())
    parts = (part for pooler in poolers if isinstance(pooler, nn.Module) for part in pooler.modules())
    found = (getattr(part, "projector", None) for part in parts)
    return [projector for projector in found if isinstance(projector, nn.Module)]


def projection_in(path: str, model: nn.Module, model_config: Any) -> nn.Module | None:
    """What vLLM would make of the Dense layers of the checkpoint at ``path``; ``None`` if there are none.

    Raises:
        UsageError: they are others than those that the model was built with.
    """
    live = projections(model)
    if not live or not os.path.isdir(path):
        return None
    from vllm.model_executor.models.adapters import _load_st_projector

    with torch.device("cpu"):
        made: nn.Module | None = _load_st_projector(
            SimpleNamespace(model=os.path.abspath(path), revision=None, head_dtype=model_config.head_dtype)
        )
    if made is None:
        return None
    shapes = [{name: list(tensor.shape) for name, tensor in each.state_dict().items()} for each in (made, live[0])]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"the Dense layers of sentence-transformers in {path} are {shapes[0]}, and this engine was started with "
            f"{shapes[1]}; start a new engine with this checkpoint"
        )
    return made


def project(model: nn.Module, made: nn.Module) -> None:
    """Copy the values into the projection of each pooler, in place."""
    for live in projections(model):
        for name, tensor in live.state_dict().items():  # Detached: each shares its parameter's memory.
            tensor.copy_(made.get_parameter(name).detach())
