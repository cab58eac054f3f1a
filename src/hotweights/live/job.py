"""Job: what an update has to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

import torch
from torch import nn

from ..plan.plan import LoadPlan
from .groups import LayerGroup
from .layout import MemoryLayout


@dataclass(frozen=True)
class Job:
    """What an update works with.

    Attributes:
        model: the model.
        process: processes one layer.
        plan: the whole plan.
        direct: what is written where it lies.
        units: the others.
        spans: of the checkpoint format; scratch is laid out like it.
        initial: values from before the first load that units begin with, by name, on the host.
        live: every live tensor by name; of the first load, those of checkpoint format that are not processed yet.
        partial: those of which the plan writes not all bytes.
        acted: names of tensors that no plan writes and processing has changed at any time; it is added to.
        first: whether the model itself is in checkpoint format: its own tensors are filled.
    """

    model: nn.Module
    process: Callable[[nn.Module], object]
    plan: LoadPlan
    direct: LayerGroup
    units: list[LayerGroup]
    spans: MemoryLayout
    initial: Mapping[str, torch.Tensor]
    live: MutableMapping[str, torch.Tensor]
    partial: frozenset[str]
    acted: set[str]
    first: bool
