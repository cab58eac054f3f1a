"""torchao: processing that quantises linear layers. It is imported only when it is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import MissingPackage, UsageError

__all__ = ["quantise"]


def quantise(
    config: object, *, chosen: Callable[[nn.Module], bool] = lambda layer: isinstance(layer, nn.Linear)
) -> Callable[[nn.Module], None]:
    """Processing for ``LiveModel(process=...)`` that hands each chosen layer to ``torchao.quantization.quantize_``.

    Args:
        config: one of torchao's, ``Int8WeightOnlyConfig()`` for instance.
        chosen: which layers; by default every linear one.

    Raises:
        MissingPackage: torchao is not installed.
    """
    try:
        from torchao.core.config import AOBaseConfig
        from torchao.quantization import quantize_
    except ImportError as error:
        raise MissingPackage("torchao", "torchao") from error
    if not isinstance(config, AOBaseConfig):
        raise UsageError(f"quantise takes a config of torchao's; this is a {type(config).__name__}")
    known: Any = config

    def process(layer: nn.Module) -> None:
        if chosen(layer):
            quantize_(layer, known, filter_fn=lambda module, _: module is layer)
            layer.__dict__.pop("extra_repr", None)  # A closure, for printing only, and another one each time.

    return process
