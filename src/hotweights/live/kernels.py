"""Kernels: tensors of processed layers are no checkpoint's, and loading code that processes itself is found out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn

from .. import signals
from ..errors import SourceError
from ..memory.extents import Extents
from ..sources.contracts import InMemory, Source
from ..text import some

_WORD = "process_weights_after_loading"


def processes(layer: nn.Module) -> bool:
    """Whether the layer has a ``quant_method`` that processes it."""
    return hasattr(getattr(layer, "quant_method", None), _WORD)


def memory_of(layers: Iterable[nn.Module]) -> Extents:
    """Where the parameters and buffers of these layers lie."""
    stores = (store for layer in layers for store in (layer._parameters, layer._buffers))
    return Extents(tensor for store in stores for tensor in store.values() if tensor is not None)


def told_of_own(names: list[str]) -> str:
    """The warning of a first load that processes what the model itself holds."""
    return (
        f"{some(names, 3)}: taken from the model's own layers, as if these were in checkpoint format, and processed; "
        "if somebody has processed these layers before, they are so twice: make a new model, and load the checkpoint"
    )


def own_of(source: Source, kernels: Extents) -> list[str]:
    """Names of the tensors of a source that lie in this memory."""
    if not isinstance(source, InMemory):
        return []
    return [name for name in source.manifest if kernels.meets(source.borrow(name))]


def refuse_kernels(names: Iterable[str]) -> None:
    """Refuse tensors that lie in processed layers: as a source they would be processed twice.

    Raises:
        SourceError: there are any.
    """
    if problems := [f"{name}: lies in a layer of the live model that was processed" for name in names]:
        raise SourceError(
            "the source is made of the live model's own kernel format, which would be processed once more; give the "
            "checkpoint, or, if processing leaves these tensors as a checkpoint has them, copies (tensor.clone())",
            problems,
        )


@contextmanager
@signals.held
def noting_calls(layers: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Inside, the layers that somebody's code processes by the method of their ``quant_method`` are noted."""
    found: list[nn.Module] = []
    kinds = {type(layer.quant_method) for layer in layers}
    before: list[tuple[Any, Any, bool]] = []
    try:
        for kind in kinds:
            method = getattr(kind, _WORD, None)
            if callable(method):
                own = _WORD in vars(kind)
                before.append((kind, vars(kind).get(_WORD), own))
                setattr(kind, _WORD, _noting(method, found))
        yield found
    finally:
        for kind, method, own in reversed(before):
            if own:
                setattr(kind, _WORD, method)
            else:
                delattr(kind, _WORD)


def _noting(method: Any, found: list[nn.Module]) -> Any:
    @wraps(method)
    def noting(*args: Any, **kwargs: Any) -> Any:
        found.extend(value for value in (*args[1:], *kwargs.values()) if isinstance(value, nn.Module))
        return method(*args, **kwargs)

    return noting


def processes_itself(code: str, names: list[str]) -> str:
    """What is said of loading code that processes layers, which the live model would do once more."""
    return (
        f"{some(names, 3)}: {code} processes these layers itself (it calls {_WORD}), and the live model would process "
        f"them once more. Take that call out of {code}; or leave it there, and say that nobody else is to do it: "
        "LiveModel(model, process=lambda layer: None)"
    )
