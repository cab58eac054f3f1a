"""How long plans take: to trace, to save, to load, to find again; and how much memory they are. No weight is read."""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import hotweights as hw


class Layer(nn.Module):
    """Three tensors of the checkpoint become one of the model; one is copied, one is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.empty(12, 4), requires_grad=False)
        self.norm = nn.Parameter(torch.empty(4), requires_grad=False)


class Model(nn.Module):
    """A model with loading code of its own, as engines have it."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def load_weights(self, pairs: Any) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in pairs:
            layer, _, key = name.rpartition(".")
            if key in ("q", "k", "v"):
                parameters[f"{layer}.qkv"].narrow(0, "qkv".index(key) * 4, 4).copy_(tensor)
            else:
                parameters[name].copy_(tensor)


def manifest(layers: int) -> hw.Manifest:
    shapes = {"q": (4, 4), "k": (4, 4), "v": (4, 4), "norm": (4,)}
    return hw.Manifest(
        hw.TensorSpec(f"layers.{number}.{key}", torch.float32, shape)
        for number in range(layers)
        for key, shape in shapes.items()
    )


def timed(work: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    seconds, out = [], None
    for _ in range(rounds):
        del out
        gc.collect()
        began = time.perf_counter()
        out = work()
        seconds.append(time.perf_counter() - began)
    return median(seconds), out


def held(work: Callable[[], Any]) -> int:
    """Bytes of Python objects that the result of ``work`` keeps."""
    gc.collect()
    tracemalloc.start()
    kept = work()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del kept
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, default=200_000, help="in the checkpoint; four a layer")
    parser.add_argument("--rounds", type=int, default=3, help="medians of how many")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args()
    layers = options.tensors // 4
    count = layers * 4
    promised = manifest(layers)
    model = Model(layers)
    numbers: dict[str, float] = {}
    numbers["trace_s"], plan = timed(lambda: hw.trace(model, promised), options.rounds)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.plan"
        numbers["save_s"], _ = timed(lambda: plan.save(path), options.rounds)
        numbers["file_bytes"] = path.stat().st_size
        numbers["load_s"], _ = timed(lambda: hw.LoadPlan.load(path), options.rounds)
        numbers["memory_bytes"] = held(lambda: hw.LoadPlan.load(path))
    numbers["order_s"], _ = timed(lambda: plan.ordered("layer"), options.rounds)
    numbers["find_again_s"] = find_again(model, promised, plan, options.rounds)
    limits = {"trace_s": 60, "find_again_s": 10}  # us a tensor
    print(f"{count:,} tensors, {len(plan.steps):,} steps; torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, value in numbers.items():
        each = value / count * (1e6 if name.endswith("_s") else 1)
        shown = f"{value:.2f} s" if name.endswith("_s") else f"{value / 1e6:.1f} MB"
        limit = f"   {each / limits[name]:.2f} of the limit of {limits[name]} us" if name in limits else ""
        unit = "us" if name.endswith("_s") else "bytes"
        print(f"{name.rpartition('_')[0].replace('_', ' '):>12}  {shown:>10}  {each:7.1f} {unit} a tensor{limit}")
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2))


def find_again(model: nn.Module, promised: hw.Manifest, plan: hw.LoadPlan, rounds: int) -> float:
    """What a load with a cached plan pays to know that it is still the right one."""
    from hotweights.loading.cache import planned

    planned(model, None, promised, (), lambda: plan)

    def never() -> hw.LoadPlan:
        raise AssertionError("it was not found again")

    return timed(lambda: planned(model, None, promised, (), never), rounds)[0]


if __name__ == "__main__":
    main()
