"""Measures how long a staged commit keeps readers out, on torch's default threads and on one, beside busy neighbours.

    python benchmarks/stall.py                  # 90 MB in 103 tensors, one busy process for each processor
    python benchmarks/stall.py --neighbours 0

The ways take turns in random order, in one process; medians are shown. ``copy_`` is what torch does for the same bytes,
one tensor after the other.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack

import torch
from torch import nn

import hotweights as hw

SIZES = [2_400_000] * 36 + [60_000] * 56 + [512] * 11  # bytes: matrices, embeddings of positions, norms


def model() -> nn.Module:
    return nn.ParameterList(nn.Parameter(torch.zeros(nbytes // 4), requires_grad=False) for nbytes in SIZES)


def version(number: int) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, float(number)) for name, tensor in model().state_dict().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--neighbours", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    versions, into, threads = [version(1), version(2)], version(0), torch.get_num_threads()
    live = hw.LiveModel(model())
    live.load(versions[0])
    live.update(versions[1])

    def commit(number: int) -> float:
        with live.begin() as update:
            update.feed(versions[number % 2])
            update.prepare()
            then = time.perf_counter()
            update.commit()
            return time.perf_counter() - then

    def copy(number: int) -> float:
        then = time.perf_counter()
        for name, tensor in into.items():
            tensor.copy_(versions[number % 2][name])
        return time.perf_counter() - then

    ways = [(what, count) for what in (commit, copy) for count in (threads, 1)]
    took: dict[tuple[str, int], list[float]] = {(what.__name__, count): [] for what, count in ways}
    with ExitStack() as stack:
        for _ in range(options.neighbours):
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(busy.wait)
            stack.callback(busy.kill)
        for number in range(options.rounds):
            for what, count in random.sample(ways, len(ways)):
                torch.set_num_threads(count)
                took[what.__name__, count].append(what(number))
    for what in ("commit", "copy"):
        default, single = (statistics.median(took[what, count]) for count in (threads, 1))
        print(
            f"{what}: {default * 1e3:.1f} ms on {threads} threads (at most {max(took[what, threads]) * 1e3:.1f}), "
            f"{single * 1e3:.1f} ms on 1: ratio {default / single:.2f}"
        )


if __name__ == "__main__":
    main()
