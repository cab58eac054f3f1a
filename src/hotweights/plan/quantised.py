"""Quantised checkpoints: which method wrote one is seen by its names. Nothing is dequantised here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ..manifest import Manifest

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


def unscaled(manifest: Manifest, casts: Iterable[str], homeless: Iterable[str]) -> Iterator[str]:
    """In words: quantised tensors among ``casts`` whose scales are ``homeless``. Such values are wrong by a factor."""
    scales: dict[str, str] = {}
    for name in homeless:
        if quantised_by([name]) is not None:
            scales.setdefault(name.rpartition(".")[0], name)
    for source in casts if scales else ():
        scale, dtype = scales.get(source.rpartition(".")[0]), manifest[source].dtype
        if scale is not None and isinstance(dtype, torch.dtype) and dtype.itemsize == 1:
            yield f"{manifest[source]}: is quantised, and what scales it, {scale}, has no place in the model"
