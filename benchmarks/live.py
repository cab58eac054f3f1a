"""Measures updates of a live model against a plain copy of the same bytes, and draws how much memory lies open.

    python benchmarks/live.py                  # 1 GB in 200 tensors, from memory, without processing
    python benchmarks/live.py --plot open.png  # also: device bytes of open layers over time, by order of arrival
    python benchmarks/live.py --timeline update.json

Ways take turns, round after round, in one process; medians are shown. The first update of each, which makes the copy of
the model on the host, is left out. Every result is compared with what was sent, outside the timing.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from hotweights import LiveModel, UpdateReport
from load import MB, parse_size

WAYS = {"in place (False)": False, "journal": "journal", "staged": "staged"}
Weights = dict[str, torch.Tensor]


class Layers(nn.Module):
    """Layers of one weight each, of ``nbytes`` together."""

    def __init__(self, nbytes: int, tensors: int) -> None:
        super().__init__()
        shape = (nbytes // tensors // 2 // 1024, 1024)
        blank = (nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16), requires_grad=False) for _ in range(tensors))
        self.layers = nn.ModuleList(_holding(weight) for weight in blank)


def _holding(weight: nn.Parameter) -> nn.Module:
    layer = nn.Module()
    layer.weight = weight
    return layer


def weights(model: nn.Module, value: float) -> Weights:
    return {name: torch.full_like(tensor, value).detach() for name, tensor in model.state_dict().items()}


def plain_copy(model: nn.Module, new: Weights) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(new[name])


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(options: argparse.Namespace, console: Console) -> None:
    model = Layers(options.size, options.tensors)
    versions = itertools.cycle([weights(model, 1.0), weights(model, 2.0)])
    lives = {name: LiveModel(Layers(options.size, options.tensors), atomic=way) for name, way in WAYS.items()}
    for live in lives.values():
        live.load(next(versions))
        live.update(next(versions))
    seconds: dict[str, list[float]] = {}
    last: dict[str, UpdateReport] = {}
    with torch.no_grad():
        for _ in range(options.repeats):
            new = next(versions)
            seconds.setdefault("plain copy", []).append(timed(lambda new=new: plain_copy(model, new)))
            for name, live in lives.items():
                report: list[UpdateReport] = []
                took = timed(lambda live=live, new=new, report=report: report.append(live.update(new)))
                seconds.setdefault(name, []).append(took)
                seconds.setdefault(f"{name}: stall", []).append(report[0].stall_seconds)
                last[name] = report[0]
                if any(not torch.equal(tensor, new[key]) for key, tensor in live.model.named_parameters()):
                    raise RuntimeError(f"{name}: wrong values")
    console.print(table(seconds, options))
    if options.timeline:
        last["journal"].save_timeline(options.timeline)


def table(seconds: dict[str, list[float]], options: argparse.Namespace) -> Table:
    plain = statistics.median(seconds["plain copy"])
    result = Table(title=f"update of {options.size / 1e9:.1f} GB in {options.tensors} tensors, from memory")
    for heading in ("", "seconds", "spread", "x a plain copy"):
        result.add_column(heading, justify="left" if not heading else "right")
    for name, took in seconds.items():
        middle = statistics.median(took)
        result.add_row(name, f"{middle:.3f}", f"{min(took):.3f}..{max(took):.3f}", f"{middle / plain:.2f}")
    return result


def open_bytes(options: argparse.Namespace) -> dict[str, list[tuple[float, int]]]:
    """Device bytes of open layers over time, when layers of four tensors are pushed in three orders."""
    model = nn.Sequential(*(nn.LSTM(256, 256) for _ in range(16)))
    names = list(model.state_dict())
    orders = {
        "layer by layer": names,
        "as files are sorted": sorted(names),
        "worst: tensor by tensor over all layers": sorted(names, key=lambda name: name.rpartition(".")[2]),
    }
    by_order = {}
    # The processor plays the device: what counts as one is a single function.
    with mock.patch("hotweights.live.open_layers.is_device", lambda device: device.type != "meta"):
        for name, order in orders.items():
            live = LiveModel(model, process=lambda layer: None)
            new = model.state_dict()
            live.load({key: tensor.clone() for key, tensor in new.items()})
            with live.begin() as update:
                seen = []
                for number, key in enumerate(order):
                    update.feed([(key, new[key].clone())])
                    seen.append((number / len(order), update.open_nbytes))
                update.commit()
            by_order[name] = seen
    return by_order


def plot(found: dict[str, list[tuple[float, int]]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for name, seen in found.items():
        panel.step([at for at, _ in seen], [nbytes / MB for _, nbytes in seen], where="post", label=name)
    panel.set(xlabel="part of the tensors that came", ylabel="device memory of open layers, MB", ylim=(0, None))
    panel.legend()
    figure.savefig(path, dpi=120)


def orders_table(found: dict[str, list[tuple[float, int]]]) -> Table:
    made = Table(title="16 layers of 4 tensors, pushed: device memory of open layers")
    made.add_column("")
    made.add_column("MB at peak", justify="right")
    for name, seen in found.items():
        made.add_row(name, f"{max(nbytes for _, nbytes in seen) / MB:.1f}")
    return made


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default="1GB", help="bytes of the model (1GB)")
    parser.add_argument("--tensors", type=int, default=200, help="tensors in it (200)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds; medians are shown (7)")
    parser.add_argument("--plot", help="draw device memory of open layers by order of arrival (needs matplotlib)")
    parser.add_argument("--timeline", help="write one journalled update as a Chrome trace")
    return parser.parse_args(arguments)


def main(arguments: Iterable[str] | None = None) -> None:
    options = parse(None if arguments is None else list(arguments))
    console = Console()
    measure(options, console)
    opened = open_bytes(options)
    console.print(orders_table(opened))
    if options.plot:
        plot(opened, options.plot)


if __name__ == "__main__":
    main()
