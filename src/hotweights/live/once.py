"""Once: processes a live model's layers, and sees to it, as far as that is seen, that nobody does it twice."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from .. import signals
from ..errors import PlanError
from ..manifest import Manifest
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

_SHAPES = re.compile(r"\[([\d, ]+)\] expected.*?\[([\d, ]+)\] found")
_PACKED = re.compile(r"(.+)\.[^.]+: missing; (I|U|F8)\S* ")
_BY_AN_ENGINE = (
    "{names}: is not as in this checkpoint, but as processing may leave it. If an engine has processed layers of this "
    "model already (process_weights_after_loading), make the LiveModel before that, and let its load process them; if "
    "nobody has, this checkpoint is another model's."
)


def process_by_quant_method(layer: nn.Module) -> None:
    """What engines do after loading: ``layer.quant_method.process_weights_after_loading(layer)`` where there is one."""
    layer.quant_method.process_weights_after_loading(layer)  # type: ignore[union-attr, operator]


class Once:
    """Processes a live model's layers, and refuses what somebody else has processed, as far as that is seen."""

    def __init__(self, model: nn.Module, process: Process | None, is_processed: _IsProcessed) -> None:
        self._model, self._process, self._is_processed = model, process, is_processed
        self._by_code: set[nn.Module] = set()  # those that the model's own loading code has processed by itself

    @property
    def process(self) -> Process:
        """Process one layer, which must be in checkpoint format."""
        if self._process is None:
            return process_by_quant_method
        return self._process if not self._by_code else self._process_unless_done

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
                names = self._kernels_in(error.problems, manifest)
                lines = error.advice.splitlines()
                if names:  # To allow its names would leave such a layer without weights.
                    lines = [line for line in lines if "allow_" not in line]
                    lines.append(_BY_AN_ENGINE.format(names=some(names, 3)))
                error.advice = "\n".join(lines)
            raise

    def _by_both(self, called: list[nn.Module]) -> list[nn.Module]:
        """Those that the live model is sure to process too: what a ``process=`` does is seen when it is called."""
        layers = {} if self._process is not None else self._layers()
        return [layer for layer in called if layer in layers and processes(layer)]

    def _layers(self) -> dict[nn.Module, str]:
        return {layer: name for name, layer in self._model.named_modules() if self._is_processed(name, layer)}

    def _is_done(self, name: str, layer: nn.Module) -> bool:
        return layer in self._by_code or (self._is_processed(name, layer) and processes(layer))

    def _kernels_in(self, problems: Sequence[str], manifest: Manifest) -> list[str]:
        """The processed layers of which a problem tells such a shape, or integers for floats, as processing makes."""
        layers = {name: layer for layer, name in self._layers().items() if name}
        found: dict[str, None] = {}
        for problem in problems:
            name = max((name for name in layers if f"{name}." in problem), key=len, default=None)
            if name is None:
                continue
            shapes, packed = _SHAPES.search(problem), _PACKED.match(problem) and f"{name}.weight" in manifest
            if packed or (
                shapes and (_is_unlike_itself(layers[name]) or _made_by_processing(*map(_shape, shapes.groups())))
            ):
                found[name] = None
        return [*found]

    def _twice(self, called: list[nn.Module], who: str = "") -> PlanError:
        names = self._layers()
        several = [names.get(layer) or type(layer).__name__ for layer in dict.fromkeys(called)]
        return PlanError(
            "layers would be processed twice" + ("" if who else "; nothing was read or written"),
            [processes_itself(f"{type(self._model).__name__}.load_weights", several, who)],
        )


def _shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _is_unlike_itself(layer: nn.Module) -> bool:
    """Whether a weight is not of the sizes that the layer was made with, as far as it keeps them as Linear does."""
    sizes = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    weight = layer._parameters.get("weight")
    return None not in sizes and weight is not None and tuple(weight.shape) != sizes


def _made_by_processing(held: tuple[int, ...], read: tuple[int, ...]) -> bool:
    """Whether a tensor of one shape may be what processing made of the other: turned round, packed anew, padded.

    A rank's part of a tensor, or another model's size, is neither.
    """
    if held == read:
        return False
    turned = len(held) == len(read) and all(own >= of for own, of in zip(held, reversed(read), strict=True))
    padded = len(held) == len(read) and all(own >= of for own, of in zip(held, read, strict=True))
    return sorted(held) == sorted(read) or _elements(held) == _elements(read) or (turned and not padded)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
