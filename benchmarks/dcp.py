"""Measures ``hotweights.load`` of a DCP directory against ``torch.distributed.checkpoint.load`` of the same one.

    python benchmarks/dcp.py                # 1 GB, saved by four ranks of FSDP2; about two minutes
    python benchmarks/dcp.py --quick        # the same on small files, to see that it works

The files are in the page cache, and the parameters were touched before. The contenders take turns in random order, in
one process for a plain model, and in two that start together for a sharded one. Each round loads what another one
saved, and every result is compared outside the timing. Medians are shown, and the ratio to torch's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import hotweights as hw

Seconds = dict[str, list[float]]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        for name, rows, columns in (("q", 1, 1), ("k", 1, 1), ("v", 1, 1), ("o", 1, 1), ("up", 4, 1), ("down", 1, 4)):
            self.add_module(name, nn.Linear(columns * width, rows * width, bias=False, dtype=torch.bfloat16))
        self.norm = nn.RMSNorm(width, dtype=torch.bfloat16)


def model(width: int, layers: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({"layers": nn.ModuleList(Block(width) for _ in range(layers))})


def sharded(kind: str, ranks: int, size: tuple[int, int], seed: int) -> nn.Module:
    made = model(*size, seed)
    mesh = init_device_mesh("cpu", (ranks,))
    for block in made["layers"]:
        if kind == "tp":
            columns = {name: ColwiseParallel() for name in ("q", "k", "v", "up")}
            parallelize_module(block, mesh, columns | {name: RowwiseParallel() for name in ("o", "down")})
        else:
            fully_shard(block, mesh=mesh)
    return made


def by_torch(target: nn.Module, folder: str) -> None:
    dcp.load({"model": target.state_dict()}, checkpoint_id=folder)  # Its tensors are the model's own.


def by_us(target: nn.Module, folder: str) -> None:
    hw.load(target, folder)


CONTENDERS: dict[str, Callable[[nn.Module, str], None]] = {"dcp.load": by_torch, "hw.load": by_us}


def rounds(target: nn.Module, folders: list[str], count: int, seed: int, together: Callable[[], None]) -> Seconds:
    """Every contender once in each round, in random order, and once before the clock."""
    wanted = [digest(target, folder) for folder in folders]
    seconds: Seconds = {name: [] for name in CONTENDERS}
    order = random.Random(seed)
    for number in range(count + 1):
        for turn, name in enumerate(order.sample(list(CONTENDERS), len(CONTENDERS))):
            folder = folders[turn % 2]
            together()
            began = time.perf_counter()
            CONTENDERS[name](target, folder)
            together()
            if number:
                seconds[name].append(time.perf_counter() - began)
            assert sums(target) == wanted[turn % 2], f"{name} loaded something else"
    return seconds


def digest(target: nn.Module, folder: str) -> list[int]:
    by_torch(target, folder)
    return sums(target)


def sums(target: nn.Module) -> list[int]:
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in target.state_dict().values())
    return [int(tensor.detach().contiguous().view(torch.int16).to(torch.int64).sum()) for tensor in local]


def _rank(
    rank: int, ranks: int, store: str, work: Callable[..., Any], arguments: tuple[Any, ...], answers: Any
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    result = work(ranks, *arguments)
    if rank == 0:
        answers.put(result)
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(ranks: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` returns on the first rank."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    store = tempfile.mktemp(dir=folder)
    processes = [
        context.Process(target=_rank, args=(rank, ranks, store, work, arguments, answers)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    answer = answers.get(timeout=600)
    for process in processes:
        process.join(timeout=60)
    return answer


def save(ranks: int, kind: str, size: tuple[int, int], folders: list[str]) -> int:
    for seed, folder in enumerate(folders):
        made = sharded(kind, ranks, size, seed)
        dcp.save({"model": made.state_dict()}, checkpoint_id=folder)
    return sum(tensor.nbytes for tensor in model(*size, 0).state_dict().values())


def measure_ranks(ranks: int, kind: str, size: tuple[int, int], folders: list[str], count: int) -> Seconds:
    return rounds(sharded(kind, ranks, size, 9), folders, count, 0, dist.barrier)


def measure_plain(size: tuple[int, int], folders: list[str], count: int) -> Seconds:
    return rounds(model(*size, 9), folders, count, 0, lambda: None)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--quick", action="store_true", help="small files, one round: to see that it works")
    flags.add_argument("--width", type=int, default=1024, help="of the layers; one has 12 width² elements")
    flags.add_argument("--layers", type=int, default=40)
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument(
        "--saved", choices=["fsdp", "tp"], default="fsdp", help="how the four ranks that save are sharded"
    )
    flags.add_argument("--json", type=Path, help="write the seconds to a file")
    flags.add_argument("--dir", type=Path, help="where the files lie; they are removed at the end")
    options = flags.parse_args()
    size = (64, 2) if options.quick else (options.width, options.layers)
    count = 1 if options.quick else options.rounds
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        place = Path(directory)
        folders = [str(place / f"step-{step}") for step in (1, 2)]
        nbytes = on_ranks(4, place, save, options.saved, size, folders)
        results = {"a plain model": measure_plain(size, folders, count)}
        for kind in ("fsdp", "tp"):
            results[f"two ranks, {kind}"] = on_ranks(2, place, measure_ranks, kind, size, folders, count)
    print(f"{nbytes / 1e9:.2f} GB saved by four ranks ({options.saved}); torch {torch.__version__}")
    for into, seconds in results.items():
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ratio = medians["hw.load"] / medians["dcp.load"]
        spread = ", ".join(
            f"{name} {medians[name]:.3f} s ({min(all_):.3f} to {max(all_):.3f})" for name, all_ in seconds.items()
        )
        print(f"into {into}: {spread}; hw.load over dcp.load {ratio:.2f}")
    if options.json:
        options.json.write_text(json.dumps({"nbytes": nbytes, "seconds": results}))


if __name__ == "__main__":
    main()
