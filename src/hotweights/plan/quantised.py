"""Quantised checkpoints: which method wrote one is seen by its names. Nothing is dequantised here."""

from __future__ import annotations

from collections.abc import Iterable

_SUFFIXES = (
    ("bitsandbytes", (".absmax", ".quant_map", ".SCB", ".bitsandbytes__nf4", ".bitsandbytes__fp4")),
    ("compressed-tensors", (".weight_packed", ".weight_shape", ".weight_global_scale", ".weight_zero_point")),
    ("mxfp4", ("_proj_blocks", "_proj_scales")),
    ("gptq", (".g_idx",)),
    ("awq or gptq", (".qweight", ".qzeros")),
    ("fp8, block by block", (".weight_scale_inv", "_proj_scale_inv")),
    ("compressed-tensors or fp8", (".weight_scale",)),
)
"""What transformers' quantisation methods add to a weight's name; the first that is there tells most."""


def quantised_by(names: Iterable[str]) -> tuple[str, str] | None:
    """The method whose tensors are among these names, as ``quantization_config`` calls it, and one of the names."""
    several = list(names)
    for method, suffixes in _SUFFIXES:
        for name in several:
            if name.endswith(suffixes):
                return method, name
    return None
