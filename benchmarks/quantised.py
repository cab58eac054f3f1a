"""Measures updates of a model that torchao quantises to int8, against the quantising alone and against a cold load.

    python benchmarks/quantised.py             # 400 MB of fp32 in 24 linear layers, from memory
    python benchmarks/quantised.py --layers 4 --width 256 --repeats 1

Ways take turns, round after round, in one process: medians, and the fastest round over the fastest processing.
*Processing alone* copies nothing: it quantises fresh layers that hold the new weights already. *By hand* does for
each layer what an update in place must: copies the new weights into one and the same scratch, quantises that, copies
the result over what is live; nothing is planned, checked or kept. A *cold load* makes the model, loads and quantises
it. The first update of each way, which makes the copy of the model on the host, is left out. Every result is compared
with a cold load. *Copied* are the bytes that are moved besides processing: into scratch, aside, and into place.
*Memory* is what RssAnon of an own process rises by during the second update, at peak; of processing, during that of
one layer.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from hotweights import LiveModel, UpdateReport
from hotweights.engines.torchao import quantise
from isolate import Stage, call

WAYS = {"update, in place": False, "update, journal": "journal", "update, staged": "staged"}
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
COPIES = {"by hand": (1, 1), "update, in place": (1, 1), "update, journal": (1, 2), "update, staged": (1, 2)}
"""How often the checkpoint's bytes and those that are live are copied."""


def model_of(layers: int, width: int) -> nn.Module:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    return model.to_empty(device="cpu").requires_grad_(False)


def weights(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {name: torch.rand(tensor.shape, generator=made) for name, tensor in model.state_dict().items()}


def holding(new: dict[str, torch.Tensor], options: argparse.Namespace) -> nn.Module:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(options.width, options.width, bias=False) for _ in range(options.layers)))
    model.load_state_dict(new, assign=True)
    return model


Process = Callable[[nn.Module], None]


def processed(model: nn.Module, process: Process) -> nn.Module:
    with torch.no_grad():
        for layer in model:
            process(layer)
    return model


def cold(new: dict[str, torch.Tensor], options: argparse.Namespace, process: Process) -> nn.Module:
    model = model_of(options.layers, options.width)
    model.load_state_dict(new)
    return processed(model, process)


class ByHand:
    """What an update in place comes down to."""

    def __init__(self, new: dict[str, torch.Tensor], options: argparse.Namespace, process: Process) -> None:
        self.model = cold(new, options, process)
        self._process = process
        self._scratch = torch.empty(options.width, options.width)

    def update(self, new: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for number, live in enumerate(self.model):
                with torch.device("meta"):
                    layer = nn.Linear(1, 1, bias=False)
                layer.weight = nn.Parameter(self._scratch.copy_(new[f"{number}.weight"]), requires_grad=False)
                self._process(layer)
                for key in ("qdata", "scale"):
                    getattr(live.weight, key).copy_(getattr(layer.weight, key))


def same(model: nn.Module, expected: nn.Module) -> bool:
    pairs = zip(model, expected, strict=True)
    return all(
        torch.equal(getattr(a.weight, key), getattr(b.weight, key)) for a, b in pairs for key in ("qdata", "scale")
    )


def measure(options: argparse.Namespace, console: Console) -> None:
    memory = {name: peak(name, options) for name in ("processing alone", *WAYS)}
    process = int8()
    versions = itertools.cycle([weights(model_of(options.layers, options.width), seed) for seed in (1, 2)])
    lives: dict[str, Any] = {"by hand": ByHand(next(versions), options, process)}
    for name, way in WAYS.items():
        lives[name] = LiveModel(model_of(options.layers, options.width), process=process, atomic=way)
        lives[name].load(next(versions))
    for live in lives.values():
        live.update(next(versions))
    rounds: dict[str, list[Round]] = {}
    for _ in range(options.repeats):
        new = next(versions)
        model = holding(new, options)
        clock(rounds, "processing alone", lambda model=model: processed(model, process))
        expected = clock(rounds, "cold load", lambda new=new: cold(new, options, process))
        for name, live in lives.items():
            clock(rounds, name, lambda live=live, new=new: live.update(new))
            if not same(live.model, expected):
                raise SystemExit(f"{name}: the result is not that of a cold load")
    show(rounds, memory, options, console)


def int8() -> Process:
    from torchao.quantization import Int8WeightOnlyConfig

    return quantise(Int8WeightOnlyConfig())


def peak(name: str, options: argparse.Namespace) -> int:
    """Bytes that the process has more while it does it than before. Call it before torch has started threads."""

    def run(stage: Stage) -> None:
        # What is let go goes back to the system: kept by the allocator it would count for others, or for nothing.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1024 * 1024)
        process, (first, second, third) = (
            int8(),
            (weights(model_of(options.layers, options.width), n) for n in range(3)),
        )
        if name in WAYS:
            live = LiveModel(model_of(options.layers, options.width), process=process, atomic=WAYS[name])
            live.load(first)
            live.update(second)
            stage.begin()
            live.update(third)
        else:
            processed(holding(first, options), process)
            model = holding(second, options)[:1]
            stage.begin()
            processed(model, process)
        stage.end()

    return call(run, watch=True)[1].anonymous


class Round(NamedTuple):
    seconds: float
    faults: int
    result: Any


def clock(rounds: dict[str, list[Round]], name: str, work: Callable[[], Any]) -> Any:
    faults, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    result = work()
    took = time.perf_counter() - began
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    rounds.setdefault(name, []).append(Round(took, faults, result if isinstance(result, UpdateReport) else None))
    return result


def show(rounds: dict[str, list[Round]], memory: dict[str, int], options: argparse.Namespace, console: Console) -> None:
    median = {name: statistics.median(turn.seconds for turn in turns) for name, turns in rounds.items()}
    fastest = {name: min(turn.seconds for turn in turns) for name, turns in rounds.items()}
    alone = "processing alone"
    columns = ("seconds", "x alone", "x cold load", "fastest x alone", "stall x alone", "copied, MB", "page faults")
    table = Table("", *columns, "memory, MB", "and a copy, MB")
    for name, turns in rounds.items():
        ratios = [median[name] / median[base] for base in (alone, "cold load")] + [fastest[name] / fastest[alone]]
        report = turns[-1].result
        stall = f"{min(turn.result.stall_seconds for turn in turns) / fastest[alone]:.2f}" if report else ""
        full, live = (options.layers * options.width * size for size in (4 * options.width, options.width + 4))
        copied = (
            f"{sum(n * nbytes for n, nbytes in zip(COPIES.get(name, (0, 0)), (full, live), strict=True)) / 1e6:.0f}"
        )
        table.add_row(
            name,
            f"{median[name]:.3f}",
            *(f"{ratio:.2f}" for ratio in ratios),
            stall,
            copied,
            f"{statistics.median(turn.faults for turn in turns):.0f}",
            f"{memory[name] / 1e6:.0f}" if name in memory else "",
            f"{report.copy_bytes / 1e6:.0f}" if report else "",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="how many linear layers")
    parser.add_argument("--width", type=int, default=2048, help="inputs and outputs of each")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    measure(parser.parse_args(), Console(width=140))


if __name__ == "__main__":
    main()
