"""Quantised checkpoints: which method wrote one is seen by its names. Nothing is dequantised here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

import torch

from ..dtypes import format_name
from ..manifest import Manifest, TensorSpec
from ..text import some

_SUFFIXES = (
    ("bitsandbytes", (".absmax", ".quant_map", ".SCB", ".bitsandbytes__nf4", ".bitsandbytes__fp4")),
    ("compressed-tensors", (".weight_packed", ".weight_shape", ".weight_global_scale")),
    ("compressed-tensors or quark", (".weight_zero_point",)),
    ("mxfp4", ("_proj_blocks", "_proj_scales")),
    ("gptq", (".g_idx",)),
    ("awq or gptq", (".qweight", ".qzeros")),
    ("fp8, block by block", (".weight_scale_inv", "_proj_scale_inv")),
    ("vptq", (".centroids.weight", ".res_centroids.weight")),
    ("aqlm", (".codebooks",)),
    ("hqq", (".W_q",)),
    ("eetq", (".weight_scales",)),
    ("quanto", (".weight._data",)),
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


def refusal(method: str, name: str) -> str:
    """What is said where a model has no place for what the method wrote, this name among it."""
    return (
        f"the checkpoint is quantised by {method} ({name}; quantization_config in config.json says how), and the "
        "model is not. hotweights does not dequantise: load a checkpoint with plain weights, or use from_pretrained "
        "for this one"
    )


def in_layers_of(names: Iterable[str]) -> Callable[[str], bool]:
    """Whether a tensor lies in a layer for which there is a quantised one among these names."""
    layers = {_layer(name) for name in names if quantised_by([name]) is not None}
    return lambda name: _layer(name) in layers


def _layer(name: str) -> str:
    # bitsandbytes writes what belongs to a weight below its name: weight.absmax, weight.quant_state.bitsandbytes__nf4.
    return re.sub(r"(\.weight)?(\.quant_state)?\.[^.]*$", "", name)


def scaleless(manifest: Manifest, casts: Iterable[str]) -> Iterator[str]:
    """In words: those of ``casts`` that look like quantised weights, and come without anything that scales them.

    They may be plain: fp8 without scales is. Nobody can tell by their bytes.
    """
    names = [name for name in casts if name in manifest and _may_be_quantised(manifest[name])]
    if names:
        kinds = sorted({format_name(manifest[name].dtype) for name in names})
        yield (
            f"{some(names, 3)}: {' and '.join(kinds)}, and cast to what the model holds with nothing that scales them; "
            "if they are quantised, their values are wrong by a factor, and the model needs a checkpoint with scales"
        )


def _may_be_quantised(spec: TensorSpec) -> bool:
    dtype = spec.dtype
    if not isinstance(dtype, torch.dtype) or dtype == torch.bool:
        return False
    return dtype.itemsize == 1 and len(spec.shape) > 1


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
