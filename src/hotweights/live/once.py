"""Once: processes a live model's layers, and sees to it, as far as that is seen, that nobody does it twice."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .. import signals
from ..errors import LiveModelError, PlanError
from ..manifest import Manifest
from ..model.looks_processed import advise_of_processed
from ..model.process_calls import noting_calls
from ..model.processed import processed_among
from ..model.survey import By, own_loader
from ..model.unprocessed import unprocessed
from ..sources.contracts import Source
from ..sources.opening import AnySource
from ..text import some
from .kernels import (
    is_processing,
    memory_of,
    own_of,
    processes,
    processes_itself,
    refuse_kernels,
    refuse_own,
)

Process = Callable[[nn.Module], object]
_IsProcessed = Callable[[str, nn.Module], bool]

_MADE_BEFORE = "make the LiveModel before that, and let its load process them"


def process_by_quant_method(layer: nn.Module) -> None:
    """What engines do after loading: ``layer.quant_method.process_weights_after_loading(layer)`` where there is one."""
    layer.quant_method.process_weights_after_loading(layer)  # type: ignore[union-attr, operator]


class Once:
    """Processes a live model's layers, and refuses what somebody else has processed, as far as that is seen."""

    def __init__(self, model: nn.Module, process: Process | None, is_processed: _IsProcessed) -> None:
        self._model, self._process, self._is_processed = model, process, is_processed
        self._inside: dict[nn.Module, list[nn.Module]] | None = None  # of layers, those within them
        self._by_code: set[nn.Module] = set()  # those that the model's own loading code has processed by itself

    @property
    def process(self) -> Process:
        """Process one layer, which must be in checkpoint format."""
        if self._process is None:
            return process_by_quant_method
        if self._inside is None:  # To walk the model for each update would cost more than this finds.
            layers = self._layers()
            parts = {
                layer: [part for part in layer.modules() if part in layers and part is not layer] for layer in layers
            }
            self._inside = {layer: own for layer, own in parts.items() if own}
        return self._process if not (self._by_code or self._inside) else self._process_layer

    def _process_layer(self, layer: nn.Module) -> None:
        """Process one, and see that its parts, which are processed by themselves, keep their tensors."""
        parts = (self._inside or {}).get(layer, ())
        before = [_tensors(part) for part in parts]
        self._process_unless_done(layer)
        changed = [part for part, had in zip(parts, before, strict=True) if not _same(had, _tensors(part))]
        if changed:
            names = self._layers()
            raise LiveModelError(
                f"the processing of {names[layer] or type(layer).__name__} replaced tensors of "
                f"{some([names[part] for part in changed], 3)}, which would be processed twice: process= is called for "
                "each layer by itself. Let it leave the parts of a layer alone, or name the layers by layers="
            )

    def _process_unless_done(self, layer: nn.Module) -> None:
        assert self._process is not None
        if layer not in self._by_code:
            self._process(layer)
            return
        is_its_method = is_processing(layer, self._process)  # Such a call is not noted: it does not ask the class.
        with noting_calls([layer]) as called:
            self._process(layer)
        if called or is_its_method:
            raise self._twice([layer], "process= calls it as well")

    def refuse_own(self, source: Source) -> None:
        """Refuse, at a first load, tensors of the model's own layers, which processing is about to change.

        Raises:
            SourceError: another live model has processed them, or somebody may have.
        """
        layers = [*self._layers()]
        refuse_kernels(own_of(source, memory_of(processed_among(layers))))
        if self._process is None:
            refuse_own(own_of(source, memory_of(layer for layer in layers if processes(layer))))

    @contextmanager
    @signals.held
    def noting_code(self, by: By | None) -> Iterator[None]:
        """Inside, the model's own loading code is traced. If it processes layers itself, they would be so twice.

        Raises:
            PlanError: it processes layers by a ``quant_method``, and so does the live model.
        """
        code = own_loader(self._model, by)
        if code is None:
            yield
            return
        with noting_calls(self._model.modules()) as called:
            try:
                yield
            except PlanError as error:
                if twice := self._by_both(called):
                    raise self._twice(twice) from error
                raise
        self._by_code = {*called}
        if twice := self._by_both(called):
            raise self._twice(twice)

    def unprocessed(self) -> tuple[str, ...]:
        """A warning for layers that engines process, and that nobody does here. Who gives ``process=`` has chosen."""
        names: list[str] = []
        if self._process is None:
            names = unprocessed(self._model, self._is_done)
        if not names:
            return ()
        return (
            f"{some(names, 3)}: to be processed after loading (process_weights_after_loading), and nobody does it: by "
            "default that of a quant_method is called; give LiveModel process= and layers=",
        )

    @contextmanager
    @signals.held
    def telling(self, source: AnySource, manifest: Manifest, by: By | None) -> Iterator[None]:
        """Inside, the error of a first load says what may come of what the model was before."""
        try:
            yield
        except PlanError as error:
            if own_loader(self._model, by) is not None and isinstance(source, nn.Module):
                error.advice = (
                    "load(model) is for a model whose names and shapes are the checkpoint's, and this one has a "
                    "load_weights of its own. Give load the checkpoint that it was loaded from."
                )
            elif "processed by a LiveModel" not in error.advice:
                layers = {name: layer for layer, name in self._layers().items()}
                advise_of_processed(error, manifest, layers, _MADE_BEFORE)
            raise

    def _by_both(self, called: list[nn.Module]) -> list[nn.Module]:
        """Those that the live model is sure to process too: what a ``process=`` does is seen when it is called."""
        layers = {} if self._process is not None else self._layers()
        return [layer for layer in called if layer in layers and processes(layer)]

    def _layers(self) -> dict[nn.Module, str]:
        return {layer: name for name, layer in self._model.named_modules() if self._is_processed(name, layer)}

    def _is_done(self, name: str, layer: nn.Module) -> bool:
        return layer in self._by_code or (self._is_processed(name, layer) and processes(layer))

    def _twice(self, called: list[nn.Module], who: str = "") -> PlanError:
        names = self._layers()
        several = [names.get(layer) or type(layer).__name__ for layer in dict.fromkeys(called)]
        return PlanError(
            "layers would be processed twice" + ("" if who else "; nothing was read or written"),
            [processes_itself(f"{type(self._model).__name__}.load_weights", several, who)],
        )


def _tensors(layer: nn.Module) -> list[torch.Tensor | None]:
    return [*layer._parameters.values(), *layer._buffers.values()]


def _same(before: list[torch.Tensor | None], now: list[torch.Tensor | None]) -> bool:
    return len(before) == len(now) and all(map(operator.is_, before, now))
