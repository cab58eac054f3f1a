"""``fall_back``: what no plan can do is loaded by the model's own code, and what it writes is watched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..boxes import Box, box_of, covered, meets, moved
from ..errors import IncompleteLoad, PlanDiffers
from ..memory.aliases import has_bytes, plain
from ..memory.extents import renew
from ..memory.pool import Pool
from ..model.places import Place, places
from ..model.reachable import reachable
from ..model.survey import By, loader_of
from ..plan.patterns import typed
from ..plan.plan import LoadPlan
from ..signals import held
from ..sources.contracts import Addressed, InMemory, Source
from ..text import some
from ..tracing.dispatch import written_by
from ..tracing.threads import in_every_thread
from .execute import owned
from .report import Tally


@held  # Else a signal might leave autograd off, or a mode of torch on.
def fall_back(
    plan: LoadPlan,
    model: nn.Module,
    source: Source,
    kept: Mapping[str, torch.Tensor],
    done: Tally,
    *,
    by: By | None = None,
    pool: Pool,
    advance: Callable[[int], None],
) -> None:
    """Give the model's own loading code the tensors of ``plan.fallback``, owned; see that it wrote what only it can.

    Args:
        plan: says which; its steps were done before.
        model: is loaded by its own code, which may do anything to it.
        source: where the tensors are, unless they were ``kept``.
        kept: those that ``execute`` returned.
        done: is kept up to date.
        by: which loading code that is, see ``By``.
        pool: memory for reading.
        advance: called as bytes arrive.

    Raises:
        IncompleteLoad: the code left something unwritten.
        PlanDiffers: the code wrote over what was planned.

    These, and whatever the code raises, have a note that says which layers had been written by then.
    """
    load = loader_of(model, by)
    assert load is not None, "only models with loading code of their own fall back"

    def arrive(nbytes: int) -> None:
        done.arrive(nbytes)
        advance(nbytes)

    def tensors(names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            if name in kept:
                yield name, kept[name]  # It was counted when it came.
            elif isinstance(source, Addressed):
                yield name, owned(source, name, partial(_counted, source, done, pool, arrive))
            else:
                assert isinstance(source, InMemory)
                arrive(source.manifest[name].nbytes)
                yield name, owned(source, name, lambda reads: {})

    watch = _WriteWatch(_planned(plan, model))
    progress = _Progress(model, watch)
    with progress.told(), watch.renewing(model):
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
            if whole or progress.begun():
                raise error
            # It may need the tensors that were planned. As it wrote nothing, it can begin anew, with all of them.
            with torch.no_grad(), in_every_thread(lambda: watch):
                load(tensors(source.manifest))
        owed = [place for place in places(model) if place.name in plan.unproven]
        if unwritten := [place.name for place in owed if not progress.wrote(place)]:
            raise IncompleteLoad("the model's own loading code wrote nothing to", unwritten)
        shares = {place.name: progress.share(place) for place in owed}
        if torn := [name for name, share in shares.items() if share < 1]:
            raise IncompleteLoad(
                "the model's own loading code wrote parts",
                [f"{name}: {shares[name]:.0%}" for name in torn],
                advice="A tensor is missing in the source, or is smaller than it was. If the rest is to stay, "
                f"allow it: allow_partial={typed(torn, []) or '[...] with their names'}.",
            )


class _Progress:
    """What the model's own loading code has written so far."""

    def __init__(self, model: nn.Module, watch: _WriteWatch) -> None:
        self._model = model
        self._watch = watch
        self._before = {place.name: (place.tensor, _storage(place.tensor)) for place in places(model)}

    def begun(self) -> bool:
        """Whether it has written to any tensor that was there before."""
        return any(self._watch.saw(tensor) for tensor, _ in self._before.values() if tensor.numel())

    def wrote(self, place: Place) -> bool:
        """Whether it has written to this place, or put another tensor there."""
        return self._rebound(place) or self._watch.saw(place.tensor)

    def share(self, place: Place) -> float:
        """How much it has written of what was there before, of what it wrote to at all; another tensor is whole."""
        tensor, _ = self._before.get(place.name, (place.tensor, 0))
        if not (plain(tensor) and has_bytes(tensor)) or (self._rebound(place) and not self._watch.saw(tensor)):
            return 1.0
        return self._watch.share(tensor)

    def _rebound(self, place: Place) -> bool:
        tensor, storage = self._before.get(place.name, (None, 0))
        return place.tensor is not tensor or _storage(place.tensor) != storage

    @contextmanager
    def told(self) -> Iterator[None]:
        """Errors say which layers were written by then, by plan or by the model's code."""
        try:
            yield
        except BaseException as error:
            error.add_note(f"hotweights: {self}")
            raise

    def __str__(self) -> str:
        layers: dict[str, dict[str, float]] = defaultdict(dict)  # the written share of each tensor
        for place in places(self._model):
            if place.persistent and plain(place.tensor) and place.tensor.numel():
                layer = place.name.rpartition(".")[0] or type(self._model).__name__
                layers[layer][place.name] = 1.0 if self._rebound(place) else self._watch.share(place.tensor)
        whole = [layer for layer, shares in layers.items() if min(shares.values()) == 1]
        torn = [shares for shares in layers.values() if min(shares.values()) < 1]
        partly = [
            name if share == 1 else f"{name} ({share:.0%})"
            for shares in torn
            for name, share in shares.items()
            if share
        ]
        never = [layer for layer, shares in layers.items() if not any(shares.values())]
        words = [some(names, _SHOWN) or "none" for names in (whole, partly, never)]
        return (
            f"by then these layers had been written: {words[0]}; of others these tensors: {words[1]}; "
            f"these layers hold what they held before: {words[2]}"
        )


_SHOWN = 50  # names of each kind in the note


def _storage(tensor: torch.Tensor) -> int:
    """Which memory the tensor has; the same number for all that have none."""
    plain = tensor.layout is torch.strided and not nn.parameter.is_lazy(tensor)
    return tensor.untyped_storage()._cdata if plain else 0


def _counted(source: Addressed, done: Tally, pool: Pool, arrive: Callable[[int], None], reads: Any) -> dict[str, int]:
    bytes_by_io = source.read(reads, pool=pool, advance=arrive)
    done.count(bytes_by_io)
    return bytes_by_io


def _planned(plan: LoadPlan, model: nn.Module) -> dict[int, list[tuple[str, Box]]]:
    """What the plan writes: by the address of a storage, names and their boxes, counted from its first byte."""
    reached = reachable(model)
    boxes: dict[int, list[tuple[str, Box]]] = defaultdict(list)
    for step in plan.steps:
        for name, box in step.written:
            tensor = reached[name]
            first = int(tensor.storage_offset()) * tensor.element_size()
            box = box_of(tensor) if box is None else moved(box, first)
            boxes[tensor.untyped_storage().data_ptr()].append((name, box))
    return boxes


class _WriteWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees which memory is written by operations that go through torch's dispatcher.

    Attributes:
        conflicts: names of the model where something was written over what the plan had written.
    """

    def __init__(self, planned: Mapping[int, list[tuple[str, Box]]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._written: dict[int, set[Box]] = defaultdict(set)
        self._planned = planned
        self.conflicts: set[str] = set()

    def saw(self, tensor: torch.Tensor) -> bool:
        """Whether something was written to the tensor's memory."""
        if tensor.numel() == 0:
            return True
        written = self._written.get(tensor.untyped_storage().data_ptr(), set())
        box = box_of(tensor)
        return box in written or any(meets(box, other) for other in written)

    @contextmanager
    def renewing(self, model: nn.Module) -> Iterator[None]:
        """At the end every tensor whose memory was written has a new ``_version``: code may write through ``.data``."""
        try:
            yield
        finally:
            renew((tensor for tensor in reachable(model).values() if has_bytes(tensor) and self.saw(tensor)), ())

    def share(self, tensor: torch.Tensor) -> float:
        """How much of the tensor was written, by plan or by the model's code."""
        address, box = tensor.untyped_storage().data_ptr(), box_of(tensor)
        boxes = [*self._written.get(address, ()), *(planned for _, planned in self._planned.get(address, ()))]
        return covered([written for written in boxes if meets(written, box)], box) / box.numel

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in written_by(func, args, kwargs or {}):
            address, box = tensor.untyped_storage().data_ptr(), box_of(tensor)
            self._written[address].add(box)
            if address in self._planned:
                self.conflicts |= {name for name, other in self._planned[address] if meets(box, other)}
        return func(*args, **(kwargs or {}))
