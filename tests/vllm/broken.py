"""Checkpoints that an engine must refuse, each made of a good one by one change."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def _missing(tensors: Tensors) -> None:
    del tensors[max(name for name in tensors if "norm" in name)]


def _half(tensors: Tensors) -> None:
    """Only the query of a fused matrix."""
    for name in [name for name in tensors if ".0." in name and ("k_proj" in name or "v_proj" in name)]:
        del tensors[name]


def _shape(tensors: Tensors) -> None:
    name = next(name for name in sorted(tensors) if "o_proj.weight" in name)
    tensors[name] = tensors[name][:, 1:].contiguous()


def _same(tensors: Tensors) -> None:
    """Cut afterwards."""


CHANGES: dict[str, Callable[[Tensors], None]] = {"missing": _missing, "half": _half, "shape": _shape, "cut": _same}


def broken(kind: str, good: Path, directory: Path) -> Path:
    """A copy of the checkpoint ``good``, broken in one way."""
    path = directory / kind
    path.mkdir(parents=True)
    (path / "config.json").write_bytes((good / "config.json").read_bytes())
    tensors = {name: one for file in sorted(good.glob("*.safetensors")) for name, one in load_file(file).items()}
    CHANGES[kind](tensors)
    file = path / "model.safetensors"
    save_file(tensors, file)
    if kind == "cut":
        os.truncate(file, file.stat().st_size - 1000)
    return path
