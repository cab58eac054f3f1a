"""Four ranks of FSDP2 train, two workers follow: each rank sends what it holds. ``python examples/sharded_refit.py``.

After each step the workers must hold what ``full_tensor()`` gives. If one does not, this ends with an error.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hotweights as hw

RANKS, WORKERS, STEPS = 4, 2, 3


def network(seed: int) -> nn.Module:
    """What is trained, and what serves."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 7))


def train(rank: int, folder: str, results: Connection) -> None:
    """One rank of the trainer."""
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    model = network(seed=1)
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    optimiser = torch.optim.AdamW(model.parameters(), foreach=False)
    with hw.Sender(f"unix:{folder}/run/hw", group=dist.group.WORLD, receivers=WORKERS) as sender:
        for step in range(STEPS):
            model(torch.randint(1000, (128,))).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
            report = sender.send(model, version=f"step-{step}")  # on every rank; nothing is gathered
            full = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}  # to compare with
            if rank == 0:
                print(report)
                whole = network(seed=3)
                whole.load_state_dict(full)
                results.send((report.version, str(hw.LiveModel(whole).digest())))
    dist.barrier()
    dist.destroy_process_group()


def serve(folder: str, results: Connection) -> None:
    """One worker, with a whole model."""
    live = hw.LiveModel(network(seed=2))
    with hw.Receiver(f"unix:{folder}/run/hw") as receiver:
        for step in range(STEPS):
            live.load(receiver) if step == 0 else live.update(receiver)
            results.send((live.version, str(live.digest())))


def main() -> int:
    """Start them all, and compare."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        said, says = zip(*(context.Pipe(duplex=False) for _ in range(1 + WORKERS)), strict=True)
        processes = [context.Process(target=train, args=(rank, folder, says[0])) for rank in range(RANKS)]
        processes += [context.Process(target=serve, args=(folder, says[1 + worker])) for worker in range(WORKERS)]
        for process in processes:
            process.start()
        for pipe in says:
            pipe.close()
        for _ in range(STEPS):
            held = {pipe.recv() for pipe in said}
            if len(held) > 1:
                print(f"they hold different weights: {sorted(held)}")
                return 1
            print(f"{next(iter(held))[0]}: both workers hold the trainer's weights")
        for process in processes:
            process.join()
        return max(abs(process.exitcode or 0) for process in processes)


if __name__ == "__main__":
    sys.exit(main())
