"""Measures a version from four trainer ranks to two workers, against one rank that holds everything, and a gather.

    python benchmarks/sharded.py               # 512 MB of bfloat16 in 64 tensors
    python benchmarks/sharded.py --size 100MB  # quicker; the cost of starting weighs more
    python benchmarks/sharded.py --plan        # no bytes: planning for 60,000 tensors, 256 ranks and 64 workers

Ways take turns, round after round; medians are shown, and the first round does not count. Each process has one thread.
Every worker compares its parameters with what was sent, outside the timing.

* *one rank*: a ``Sender`` in one process that holds whole tensors.
* *sharded*: four ranks hold DTensors with ``Shard(0)``, as FSDP2 makes them, and all send.
* *full_tensor, then one rank*: the same DTensors are gathered by ``full_tensor()`` through gloo, and rank 0 sends.
* *memory*: how much more than before its send a rank other than 0 had resident at most, slots included (``VmHWM``); the
  most of all rounds, since memory that was freed may stay resident.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table as TextTable
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import hotweights as hw
from hotweights.ranges import Range
from hotweights.sharding import MeshLayout
from hotweights.transfer.sharded.holding import Table, TableRow
from hotweights.transfer.sharded.tiling import Tiling
from hotweights.transfer.sharded.words import Fill, Task, encode
from load import parse_size
from transfer import Layers, Worker, check

RANKS, WORKERS = 4, 2
ONE, SHARDED, GATHERED = "one rank", "sharded", "full_tensor, then one rank"


def _status(key: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{key}:"))


def following(pipe: Connection, nbytes: int, tensors: int, address: str) -> None:
    live = hw.LiveModel(Layers(nbytes, tensors), atomic=False)
    with hw.Receiver(address, offer_timeout=600) as receiver:
        while (value := pipe.recv()) is not None:
            live.load(receiver) if live.version is None else live.update(receiver)
            check(live.model, value)
            pipe.send("done")


def rank_of(pipe: Connection, rank: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    whole = Layers(options.size, options.tensors) if rank == 0 else None
    own = Layers(options.size // RANKS, options.tensors)
    held = {
        name: DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False) for name, tensor in own.named_parameters()
    }
    slots = {"slot_nbytes": options.slot, "timeout": 300.0}
    with ExitStack() as stack:
        sharded = stack.enter_context(
            hw.Sender(f"unix:{folder}/run/sharded", group=dist.group.WORLD, receivers=WORKERS, **slots)
        )
        alone = None
        if rank == 0:
            alone = stack.enter_context(hw.Sender(f"unix:{folder}/run/one", receivers=WORKERS, **slots))
        pipe.send("ready")
        while (order := pipe.recv()) is not None:
            way, value = order
            for parameter in (*own.parameters(), *(() if whole is None else whole.parameters())):
                parameter.fill_(value)
            dist.barrier()
            with open("/proc/self/clear_refs", "w") as peak:
                peak.write("5")
            before, began = _status("VmRSS"), time.perf_counter()
            if way == SHARDED:
                sharded.send(held, version=value, show_progress=False)
            elif way == GATHERED:
                gathered = {name: tensor.full_tensor() for name, tensor in held.items()}
                if alone is not None:
                    alone.send(gathered, version=value, show_progress=False)
                del gathered
            elif alone is not None and whole is not None:
                alone.send(whole, version=value, show_progress=False)
            pipe.send((time.perf_counter() - began, _status("VmHWM") - before))
        dist.barrier()
    dist.destroy_process_group()


def measure(options: argparse.Namespace, console: Console) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    importlib.import_module("torch._dynamo")  # Else each rank imports it by itself.
    seconds: dict[str, list[float]] = {ONE: [], SHARDED: [], GATHERED: []}
    memory: dict[str, list[int]] = {way: [] for way in seconds}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ranks = [stack.enter_context(Worker(rank_of, rank, folder, options)) for rank in range(RANKS)]
        workers = {
            way: [
                stack.enter_context(Worker(following, options.size, options.tensors, address)) for _ in range(WORKERS)
            ]
            for way, address in ((ONE, f"unix:{folder}/run/one"), (SHARDED, f"unix:{folder}/run/sharded"))
        }
        for rank in ranks:
            rank.pipe.recv()
        for number in range(options.rounds + 1):
            for place, way in enumerate(seconds):
                value = number * len(seconds) + place + 1
                own = workers[SHARDED if way == SHARDED else ONE]
                for worker in own:
                    worker.pipe.send(float(value))
                for rank in ranks:
                    rank.pipe.send((way, value))
                took = [rank.pipe.recv() for rank in ranks]
                for worker in own:
                    worker.pipe.recv()
                seconds[way].append(took[0][0])
                memory[way].append(max(more for _, more in took[1:]))
    table = TextTable(
        "",
        "seconds",
        "to one rank",
        "memory of a rank",
        title=f"{options.size / 1e6:.0f} MB in {options.tensors} tensors",
    )
    medians = {way: statistics.median(found[1:]) for way, found in seconds.items()}
    for way, median in medians.items():
        peak = "" if way == ONE else f"{max(memory[way]) / 1e6:.1f} MB"
        table.add_row(way, f"{median:.3f}", f"{median / medians[ONE]:.2f}", peak)
    console.print(table)
    console.print(
        f"Each rank holds {options.size / RANKS / 1e6:.0f} MB, and there are 4 slots of {options.slot / 1e6:.1f} MB."
    )


# Planning, on paper.

SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096), (1024, 4096), (1024, 4096), (4096,), (4096,)]


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()  # Other work on the machine does not count.
    result = work()
    return result, time.process_time() - began


def plan(options: argparse.Namespace, console: Console) -> None:
    mesh = (options.ranks // 8, 8)
    layouts = tuple(MeshLayout(tuple(range(options.ranks)), mesh, ((0, 1), (dim, 1))) for dim in (0, 1))
    rows = tuple(
        TableRow(
            f"model.layers.{number // 7}.tensor{number % 7}.weight",
            "bfloat16",
            shape,
            number % 2 if len(shape) > 1 else 0,
        )
        for number in range(options.plan_tensors)
        for shape in [SHAPES[number % len(SHAPES)]]
    )
    table = Table(layouts, rows)
    digest, hashing = _timed(table.digest)
    tiling, proving = _timed(lambda: Tiling([table], [0] * options.ranks))
    tiling.begin(apart=True)  # So many ranks are on many hosts, and send for themselves.

    def requests(number: int) -> list[tuple[int, tuple[Range, ...]]]:
        spec = tiling.tensors[number].spec
        part = spec.nbytes // options.workers
        return [(worker, (Range(worker * part, part),)) for worker in range(options.workers)]

    sample = range(0, options.plan_tensors, options.every)

    def cutting() -> tuple[int, int]:
        jobs = nbytes = filled = 0
        tasks: dict[int, list[Task]] = {}
        for number in sample:
            for job in tiling.jobs(number, requests(number), options.slot):
                if filled + job.range.size > options.slot:
                    nbytes += sum(len(encode(Fill(1, 0, tuple(own)))) for own in tasks.values())
                    tasks, filled = {}, 0
                for share in job.shares:
                    tasks.setdefault(share.rank, []).append(job.task(share, filled, hashed=True))
                filled += job.range.size
                jobs += 1
        return jobs, nbytes

    (jobs, nbytes), cut = _timed(cutting)
    text = TextTable("", "", title=f"{options.plan_tensors} tensors, {options.ranks} ranks, {options.workers} workers")
    text.add_row("tell that a table is the known one", f"{hashing:.2f} s on each rank, {len(digest)} bytes from each")
    text.add_row("the table itself, once", f"{len(msgspec.msgpack.encode(table)) / 1e6:.1f} MB")
    text.add_row("prove that all of it is there, once", f"{proving:.2f} s")
    scale = len(range(options.plan_tensors)) / len(sample)
    text.add_row(
        "who fills what, while bytes move",
        f"{cut * scale:.0f} s, {jobs * scale:.0f} chunks, {nbytes * scale / 1e6:.0f} MB of orders "
        f"(one tensor in {options.every} was counted)",
    )
    console.print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default=parse_size("512MB"))
    parser.add_argument("--slot", type=parse_size, default=4 * 1024 * 1024, help="bytes of a slot")
    parser.add_argument("--tensors", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--plan", action="store_true", help="only plan, on paper")
    parser.add_argument("--plan-tensors", type=int, default=60_000)
    parser.add_argument("--ranks", type=int, default=256, help="of the plan")
    parser.add_argument("--workers", type=int, default=64, help="of the plan")
    parser.add_argument("--every", type=int, default=101, help="count the chunks of one tensor in so many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.size -= options.size % (options.tensors * RANKS * 2 * 1024)  # whole rows of 1024 on every rank
    (plan if options.plan else measure)(options, Console())


if __name__ == "__main__":
    main()
