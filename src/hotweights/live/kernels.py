"""Kernels: tensors of processed layers are no checkpoint's, and loading code that processes itself is found out."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import getattr_static

from torch import nn

from ..errors import SourceError
from ..memory.extents import Extents
from ..sources.contracts import InMemory, Source
from ..text import some

_WORD = "process_weights_after_loading"


def processes(layer: nn.Module) -> bool:
    """Whether the layer has a ``quant_method`` that processes it."""
    return hasattr(getattr(layer, "quant_method", None), _WORD)


def is_processing(layer: nn.Module, function: object) -> bool:
    """Whether the function is the layer's own method, as its class has it."""
    return getattr_static(type(layer), _WORD, None) is function


def memory_of(layers: Iterable[nn.Module]) -> Extents:
    """Where the parameters and buffers of these layers lie."""
    stores = (store for layer in layers for store in (layer._parameters, layer._buffers))
    return Extents(tensor for store in stores for tensor in store.values() if tensor is not None)


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


def refuse_own(names: list[str]) -> None:
    """Refuse tensors of the model's own layers at a first load: nobody knows whether they were processed before.

    Raises:
        SourceError: there are any.
    """
    if names:
        raise SourceError(
            "the source is made of the model's own layers, which are processed when they are loaded: if somebody has "
            "processed them before, they would be so twice. Give the checkpoint; or, if they are as a checkpoint has "
            "them, copies: {name: tensor.clone() for name, tensor in model.state_dict().items()}",
            [f"{name}: lies in a layer of this model that has a quant_method" for name in names],
        )


def processes_itself(code: str, names: list[str], who: str = "") -> str:
    """What is said of loading code that processes layers, which the live model, or ``who``, would do once more."""
    return (
        f"{some(names, 3)}: {code} processes these layers itself (it calls {_WORD}), and "
        f"{who or 'the live model would process them once more'}. Take that call out of {code}; or leave it there, and "
        "say that nobody else is to do it: LiveModel(model, process=lambda layer: None)"
    )
