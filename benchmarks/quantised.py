"""Measures updates of a model that torchao quantises to int8, against the quantising alone and against a cold load.

    python benchmarks/quantised.py             # 400 MB of fp32 in 24 linear layers, from memory
    python benchmarks/quantised.py --layers 4 --width 256 --repeats 1

Ways take turns, round after round, in one process; medians are shown. *Processing alone* copies nothing: it quantises
fresh layers that hold the new weights already. A *cold load* makes the model, loads and quantises it. The first update
of each way, which makes the copy of the model on the host, is left out. Every result is compared with a cold load.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from hotweights import LiveModel, UpdateReport
from hotweights.engines.torchao import quantise

WAYS = {"update, in place": False, "update, journal": "journal", "update, staged": "staged"}


def model_of(layers: int, width: int) -> nn.Module:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    return model.to_empty(device="cpu").requires_grad_(False)


def weights(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {name: torch.rand(one.shape, generator=made) for name, one in model.state_dict().items()}


def holding(new: dict[str, torch.Tensor], options: argparse.Namespace) -> nn.Module:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(options.width, options.width, bias=False) for _ in range(options.layers)))
    model.load_state_dict(new, assign=True)
    return model


def processed(model: nn.Module, process: Callable[[nn.Module], None]) -> nn.Module:
    with torch.no_grad():
        for layer in model:
            process(layer)
    return model


def cold(new: dict[str, torch.Tensor], options: argparse.Namespace, process: Callable[[nn.Module], None]) -> nn.Module:
    model = model_of(options.layers, options.width)
    model.load_state_dict(new)
    return processed(model, process)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one, other, strict=True)
    return all(
        torch.equal(getattr(a.weight, key), getattr(b.weight, key)) for a, b in pairs for key in ("qdata", "scale")
    )


def measure(options: argparse.Namespace, console: Console) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    process = quantise(Int8WeightOnlyConfig())
    versions = itertools.cycle([weights(model_of(options.layers, options.width), seed) for seed in (1, 2)])
    lives = {}
    for name, way in WAYS.items():
        lives[name] = LiveModel(model_of(options.layers, options.width), process=process, atomic=way)
        lives[name].load(next(versions))
        lives[name].update(next(versions))
    seconds: dict[str, list[float]] = {}
    reports: dict[str, UpdateReport] = {}
    for _ in range(options.repeats):
        new = next(versions)
        model = holding(new, options)
        clock(seconds, "processing alone", lambda model=model: processed(model, process))
        expected = clock(seconds, "cold load", lambda new=new: cold(new, options, process))
        for name, live in lives.items():
            reports[name] = clock(seconds, name, lambda live=live, new=new: live.update(new))
            if not same(live.model, expected):
                raise SystemExit(f"{name}: the result is not that of a cold load")
    show(seconds, reports, console)


def clock(seconds: dict[str, list[float]], name: str, work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    found = work()
    seconds.setdefault(name, []).append(time.perf_counter() - began)
    return found


def show(seconds: dict[str, list[float]], reports: dict[str, UpdateReport], console: Console) -> None:
    median = {name: statistics.median(found) for name, found in seconds.items()}
    table = Table("", "seconds", "x processing", "x cold load", "scratch, MB", "copy, MB")
    for name, took in median.items():
        ratios = (f"{took / median[other]:.2f}" for other in ("processing alone", "cold load"))
        report = reports.get(name)
        memory = (f"{report.peak_scratch_bytes / 1e6:.1f}", f"{report.copy_bytes / 1e6:.1f}") if report else ("", "")
        table.add_row(name, f"{took:.3f}", *ratios, *memory)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="how many linear layers")
    parser.add_argument("--width", type=int, default=2048, help="inputs and outputs of each")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    measure(parser.parse_args(), Console())


if __name__ == "__main__":
    main()
