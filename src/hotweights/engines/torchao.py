"""torchao: processing that quantizes linear layers. torchao itself is imported only when ``quantize`` is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import MissingPackage, UsageError


def quantize(
    config: object = None, *, chosen: Callable[[nn.Module], bool] = lambda layer: isinstance(layer, nn.Linear)
) -> Callable[[nn.Module], None]:
    """Processing for ``LiveModel(process=...)`` that hands each chosen layer to ``torchao.quantization.quantize_``.

    Args:
        config: one of torchao's; by default ``Int8WeightOnlyConfig()``.
        chosen: which layers; by default every linear one.

    Raises:
        MissingPackage: torchao is not installed.
    """
    try:
        from torchao.core.config import AOBaseConfig
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise MissingPackage("torchao", "torchao") from error
    given: Any = Int8WeightOnlyConfig() if config is None else config
    if not isinstance(given, AOBaseConfig):
        raise UsageError(f"quantize takes a config of torchao's; this is a {type(given).__name__}")

    def process(layer: nn.Module) -> None:
        if chosen(layer):
            quantize_(layer, given, filter_fn=lambda module, _: module is layer)
            layer.__dict__.pop("extra_repr", None)  # A closure, for printing only, and another one each time.

    return process


quantise = quantize  # its name up to 0.1.0.dev0
