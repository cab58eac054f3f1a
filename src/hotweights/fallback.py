"""Falling back: what cannot be planned is loaded by the model's own code, with owned tensors, watched and proven."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .anchors import anchors
from .errors import IncompleteLoad, PlanDiffers
from .execute import Execution, owned
from .memory import Pool
from .modules import places
from .operations import written_by
from .plan import Copy, LoadPlan
from .regions import Box, box_of, meets
from .sources.contracts import Addressed, InMemory, Source
from .threads import in_every_thread
from .trace import loader_of

__all__ = ["fall_back"]


def fall_back(
    plan: LoadPlan,
    model: nn.Module,
    source: Source,
    kept: Mapping[str, torch.Tensor],
    done: Execution,
    *,
    pool: Pool,
    advance: Callable[[int], None],
) -> None:
    """Give the model's own loading code the tensors of ``plan.fallback``; prove that it wrote what only it can.

    Args:
        plan: says which.
        model: is loaded by its own code, which may do anything to it.
        source: where the tensors are, unless they were ``kept``.
        kept: owned tensors of a source that cannot be asked again.
        done: is kept up to date.
        pool: memory for reading.
        advance: called as bytes arrive.

    Raises:
        IncompleteLoad: its code left something unwritten.
        PlanDiffers: its code wrote over what was planned.
    """
    load = loader_of(model)
    assert load is not None, "only models with loading code of their own fall back"

    def arrive(nbytes: int) -> None:
        done.arrive(nbytes)
        advance(nbytes)

    def tensors(names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            if name in kept:
                yield name, kept[name]
            elif isinstance(source, Addressed):
                yield name, owned(source, name, partial(_counted, source, done, pool, arrive))
            else:
                assert isinstance(source, InMemory)
                arrive(source.manifest[name].nbytes)
                yield name, owned(source, name, lambda reads: {})

    before = {place.name: place.tensor for place in places(model)}
    memory = {name: _storage(one) for name, one in before.items()}
    watch = _Watch(_planned(plan, model))
    error: Exception | None = None
    try:
        with torch.no_grad(), in_every_thread(lambda: watch):
            load(tensors(plan.fallback))
    except Exception as caught:
        error = caught
    if watch.conflicts:
        raise PlanDiffers(
            "the model's own loading code wrote over what was planned apart from it", watch.conflicts
        ) from error
    if error is not None:
        whole = len(plan.fallback) == len(source.manifest) or not isinstance(source, (Addressed, InMemory))
        if whole or any(watch.saw(tensor) for tensor in before.values() if tensor.numel()):
            raise error
        # It wrote nothing: it may need the tensors that were planned, and can begin anew.
        with torch.no_grad(), in_every_thread(lambda: watch):
            load(tensors(source.manifest))
    unwritten = [
        place.name
        for place in places(model)
        # Rebound is written: its code put another tensor in its place.
        if place.name in plan.unproven
        and place.tensor is before[place.name]
        and _storage(place.tensor) == memory[place.name]
        and not watch.saw(place.tensor)
    ]
    if unwritten:
        raise IncompleteLoad("the model's own loading code wrote nothing to", unwritten)


def _storage(tensor: torch.Tensor) -> int:
    """Which memory the tensor has; the same number for all that have none."""
    plain = tensor.layout is torch.strided and not nn.parameter.is_lazy(tensor)
    return tensor.untyped_storage()._cdata if plain else 0


def _counted(
    source: Addressed, done: Execution, pool: Pool, arrive: Callable[[int], None], reads: Any
) -> dict[str, int]:
    roads = source.read(reads, pool=pool, advance=arrive)
    done.count(roads)
    return roads


def _planned(plan: LoadPlan, model: nn.Module) -> dict[int, list[tuple[str, Box]]]:
    """What the plan writes: boxes within storages, by the storage's address."""
    reached = anchors(model)
    found: dict[int, list[tuple[str, Box]]] = defaultdict(list)
    for step in plan.steps:
        parts = (
            [(step.destination, step.into)] if isinstance(step, Copy) else [(w.memory.name, w.box) for w in step.writes]
        )
        for name, box in parts:
            tensor = reached[name]
            first = int(tensor.storage_offset()) * tensor.element_size()
            box = box_of(tensor) if box is None else Box(box.dtype, box.shape, box.stride, box.offset + first)
            found[tensor.untyped_storage().data_ptr()].append((name, box))
    return found


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees which memory is written, in whatever way goes through the dispatcher."""

    def __init__(self, planned: Mapping[int, list[tuple[str, Box]]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._written: set[int] = set()
        self._planned = planned
        self.conflicts: set[str] = set()
        """Names of the model where something was written that the plan had written."""

    def saw(self, tensor: torch.Tensor) -> bool:
        """Whether something was written to the tensor's memory."""
        return tensor.numel() == 0 or tensor.untyped_storage().data_ptr() in self._written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in written_by(func, args, kwargs or {}):
            address = tensor.untyped_storage().data_ptr()
            self._written.add(address)
            if address in self._planned:
                box = box_of(tensor)
                self.conflicts |= {name for name, other in self._planned[address] if meets(box, other)}
        return func(*args, **(kwargs or {}))
