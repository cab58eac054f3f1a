"""Measures each carrier of bytes between hosts against what it stands on alone, from a trainer to live parameters.

    python benchmarks/carriers.py                 # 512 MB of bfloat16 in 64 tensors, to one receiver
    python benchmarks/carriers.py --size 100MB    # quicker; the cost of starting weighs more

Hosts are network namespaces on a switch where this runs as root, else this host by loopback. Each process has one
thread, but for those of gloo and UCX. One carrier is measured after another: UCX's threads spin. It and what it stands
on take turns in an order that is drawn anew for each round; shown are medians, and the median of each round's ratio
with its quarters. Two rounds before them do not count. Every receiver
compares its parameters with what was sent, outside the timing. Digests are off: what stands alone has none.

* *socket copy*: ``sendall`` from each tensor, ``recv_into`` each parameter.
* *gloo send/recv*: ``send`` and ``recv`` of a group of two, a tensor each, straight into the parameter.
* *NIXL write*: transfers of UCX, one for each tensor and one after another, into the parameters, registered before; one
  for all of them took longer over TCP. ``UCX_TLS`` is ``tcp`` unless it is set: between namespaces of one machine UCX
  would use shared memory. Only where NIXL is installed. Its threads spin: give it processors of its own, or be patient.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import hotweights as hw
from hosts import Hosts, Run, enter, gloo_group, ours, plain, why_not
from hotweights.transfer.carriers.table import carrier_of
from load import parse_size
from transfer import Layers, Worker, check

LIMITS = {"sockets": 1.3, "pg": 1.5, "nixl": 1.2}
LOOK = 0.0002  # seconds between two looks at a write, as the carrier's


def from_group(pipe: Connection, nbytes: int, tensors: int, host: str, here: str) -> None:
    if host:
        enter(host)
    model, group = Layers(nbytes, tensors), None
    while (value := pipe.recv()) is not None:
        group = group or gloo_group(1, 2, here, pipe.recv())
        for parameter in model.parameters():
            group.recv([parameter], 0, 0).wait()
        pipe.send("there")
        check(model, value)
        pipe.send("done")


def by_group(options: argparse.Namespace, host: str, here: str, where: str, stack: ExitStack) -> Run:
    worker = stack.enter_context(Worker(from_group, options.size, options.tensors, host, here))
    group: Any = None

    def run(trainer: nn.Module, value: float) -> float:
        nonlocal group
        worker.pipe.send(value)
        if group is None:
            worker.pipe.send((where, 29500))
            group = gloo_group(0, 2, where, (where, 29500))
        began = time.perf_counter()
        for parameter in trainer.parameters():
            group.send([parameter], 1, 0).wait()
        worker.pipe.recv()
        took = time.perf_counter() - began
        worker.pipe.recv()
        return took

    return run


def _agent(name: str, model: nn.Module) -> tuple[Any, list[tuple[int, int, int]]]:
    from hotweights.transfer.carriers.nixl import library

    api = library()
    agent = api.nixl_agent(name, api.nixl_agent_config(True, False, 0, backends=["UCX"]))
    agent.register_memory(list(model.parameters()))
    return agent, [(parameter.data_ptr(), parameter.nbytes, 0) for parameter in model.parameters()]


def from_agent(pipe: Connection, nbytes: int, tensors: int, host: str) -> None:
    if host:
        enter(host)
    model, agent = Layers(nbytes, tensors), None
    while (value := pipe.recv()) is not None:
        if agent is None:
            agent, places = _agent("receiver", model)
            pipe.send((agent.get_agent_metadata(), places))
        pipe.recv()
        check(model, value)
        pipe.send("done")


def by_agent(options: argparse.Namespace, host: str, stack: ExitStack) -> Run:
    worker = stack.enter_context(Worker(from_agent, options.size, options.tensors, host))
    agent: Any = None
    handles: list[Any] = []

    def run(trainer: nn.Module, value: float) -> float:
        nonlocal agent
        worker.pipe.send(value)
        if agent is None:
            agent, places = _agent("trainer", trainer)
            told, theirs = worker.pipe.recv()
            peer = agent.add_remote_agent(told).decode()
            for place in zip(places, theirs, strict=True):
                local, remote = (agent.get_xfer_descs([each], "cpu") for each in place)
                handles.append(agent.initialize_xfer("WRITE", local, remote, peer, b""))
        began = time.perf_counter()
        for handle in handles:
            state = agent.transfer(handle)
            while state == "PROC":
                time.sleep(LOOK)
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                raise RuntimeError(f"NIXL says {state}")
        took = time.perf_counter() - began
        worker.pipe.send("there")
        worker.pipe.recv()
        return took

    return run


def measure(options: argparse.Namespace, ways: tuple[Run, Run], trainer: nn.Module) -> list[tuple[float, float]]:
    seconds: list[tuple[float, float]] = []
    chance = random.Random(options.seed)
    for number in range(options.rounds + 2):
        value = float(number % 100 + 1)
        for parameter in trainer.parameters():
            parameter.fill_(value)
        took = {turn: ways[turn](trainer, value) for turn in chance.sample((0, 1), 2)}
        seconds.append((took[0], took[1]))
    return seconds[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default=parse_size("512MB"))
    parser.add_argument("--slot", type=parse_size, help="bytes of a slot; 16 MiB as they come")
    parser.add_argument("--tensors", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the order in which ways take turns")
    parser.add_argument("--only", choices=LIMITS, help="one carrier")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("UCX_TLS", "tcp")
    with ExitStack() as stack:
        if reason := why_not():
            host, here, where, between = "", "127.0.0.1", "127.0.0.1", f"by loopback: {reason}"
        else:
            made = stack.enter_context(Hosts())
            enter(made.names[2])
            host, here, where = made.names[0], made.addresses[0], made.addresses[2]
            between = "between network namespaces"
        alone: dict[str, tuple[str, Callable[[ExitStack], Run]]] = {
            "sockets": ("socket copy", partial(plain, options, [host], (where, 0))),
            "pg": ("gloo send/recv", partial(by_group, options, host, here, where)),
            "nixl": ("NIXL write", partial(by_agent, options, host)),
        }
        table = Table("", "alone", "version", "ratio", "aim", title=f"{options.size / 1e6:.0f} MB {between}")
        trainer = Layers(options.size, options.tensors)
        for name, (stands_on, run) in alone.items():
            if options.only not in (None, name):
                continue
            try:
                carrier_of(name)
            except hw.MissingPackage as error:
                Console().print(f"{name} is left out: {error}", markup=False)
                continue
            with ExitStack() as ends:
                carried = ours(options, [host], (where, 0), ends, digests=False, carrier=name)
                found = measure(options, (carried, run(ends)), trainer)
            seconds, theirs = (statistics.median(column) for column in zip(*found, strict=True))
            low, ratio, high = statistics.quantiles([one / other for one, other in found], n=4)
            shown = f"{ratio:.2f} ({low:.2f} to {high:.2f})"
            table.add_row(name, f"{stands_on} {theirs:.3f} s", f"{seconds:.3f} s", shown, f"{LIMITS[name]:.1f}")
        Console().print(table)


if __name__ == "__main__":
    main()
