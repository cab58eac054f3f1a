"""Job: what one update has to do, found out before it begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Set
from dataclasses import dataclass

import torch
from torch import nn

from ..dtypes import Cast
from ..memory.extents import Extents
from ..model.survey import By
from ..plan.plan import LoadPlan
from .groups import LayerGroup
from .layout import MemoryLayout


@dataclass(frozen=True)
class Job:
    """What one update has to do, and what it does it to.

    Attributes:
        model: the model.
        process: processes one layer.
        unasked: layers that it processes by their ``quant_method``, as nobody gave a ``process=``.
        plan: the whole plan.
        in_place: the group that is written into live tensors, without scratch.
        groups: the groups that are filled in scratch and processed.
        layout: how tensors lie in checkpoint format; scratch is laid out like it.
        initial: values from before the first load that groups begin with, by name, on the host.
        live: every live tensor by name; at the first load, those in checkpoint format that are not processed yet.
        partial: names of live tensors of which the plan writes only some bytes.
        acted: names of tensors that no plan writes, and that processing has changed at some time; it is added to.
        restored: names of tensors that the plan does not write, and that get their ``initial`` values.
        kept: names of the model's tensors that ``only=`` leaves alone.
        cast: which casts are done of tensors that come in another dtype than the plan's; ``None`` if none may come so.
        first: whether this is the first load: it fills the model's own tensors, which are in checkpoint format.
        warnings: what a person should read of what comes.
        kernels: the memory of layers that processing has changed; no tensor that comes lies there.
        by: which loading code the model has, see ``By``.
    """

    model: nn.Module
    process: Callable[[nn.Module], object]
    plan: LoadPlan
    in_place: LayerGroup
    groups: list[LayerGroup]
    layout: MemoryLayout
    initial: Mapping[str, torch.Tensor]
    live: MutableMapping[str, torch.Tensor]
    partial: frozenset[str]
    acted: set[str]
    restored: frozenset[str]
    kept: frozenset[str]
    cast: Cast | None
    first: bool
    kernels: Extents
    by: By | None = None
    warnings: tuple[str, ...] = ()
    unasked: Set[nn.Module] = frozenset()
