"""Tiny checkpoints, written by code that shares nothing with our readers or with the safetensors package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ..dtypes import format_name
from .checks import Tensors, bits


def write_safetensors(path: str | Path, tensors: Tensors, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, its tensors in the mapping's order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    data = bytearray()
    for name, tensor in tensors.items():
        raw = bytes(bits(tensor).tolist())
        shape = list(tensor.shape)
        if tensor.dtype == getattr(torch, "float4_e2m1fn_x2", None):
            shape[-1] *= 2
        header[name] = {
            "dtype": format_name(tensor.dtype),
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # Without padding, tensors that the reference aligns would not be.
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_checkpoint(directory: str | Path, tensors: Tensors, *, shards: int = 1) -> Path:
    """Write a checkpoint directory: one file, or several and an index, tensors dealt out in turn."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors)
        return directory
    names = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
    weight_map = {name: names[position % shards] for position, name in enumerate(tensors)}
    for shard in names:
        write_safetensors(directory / shard, {name: tensors[name] for name in tensors if weight_map[name] == shard})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory
