"""Measures a version's way from a trainer to live parameters on other hosts, against plain socket copies of its bytes.

    python benchmarks/hosts.py                 # 512 MB of bfloat16 in 64 tensors, one and two receivers
    python benchmarks/hosts.py --size 100MB    # quicker; the cost of starting weighs more

Hosts are network namespaces on a switch where this runs as root, else this host by loopback. Each process has one
thread. Ways take turns, round after round; medians are shown. Two updates before them do not count. Every receiver
compares its parameters with what was sent, outside the timing.

* *socket copy*: one TCP connection to each receiver, ``sendall`` from each tensor, ``recv_into`` each parameter.
  Nothing is checked, and whoever dies leaves parameters of two versions.
* *keys*: control goes through TLS. *Encrypted*: the weights too, by ``encrypt="all"``.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import hotweights as hw
from hotweights.memory.addresses import buffer
from load import parse_size
from transfer import Layers, Worker, check

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from namespaces import Hosts, enter, why_not

Run = Callable[[nn.Module, float], float]


def _view(tensor: torch.Tensor) -> memoryview:
    return memoryview(buffer(tensor.data_ptr(), tensor.nbytes)).cast("B")


def from_socket(pipe: Connection, nbytes: int, tensors: int, host: str, address: tuple[str, int]) -> None:
    if host:
        enter(host)
    model = Layers(nbytes, tensors)
    with socket.create_connection(address) as connected:
        while (value := pipe.recv()) is not None:
            for parameter in model.parameters():
                view = _view(parameter)
                while view:
                    view = view[connected.recv_into(view) :]
            connected.sendall(b"d")
            check(model, value)
            pipe.send("done")


def receiving(pipe: Connection, nbytes: int, tensors: int, host: str, address: str, keys: str | None) -> None:
    if host:
        enter(host)
    live = hw.LiveModel(Layers(nbytes, tensors), atomic=False)
    with hw.Receiver(address, keys=keys, insecure=keys is None) as receiver:
        while (value := pipe.recv()) is not None:
            live.load(receiver) if live.version is None else live.update(receiver)
            check(live.model, value)
            pipe.send("done")


def plain(options: argparse.Namespace, hosts: list[str], where: tuple[str, int], stack: ExitStack) -> Run:
    listening = stack.enter_context(socket.create_server(where))
    address = (where[0], listening.getsockname()[1])
    workers = [stack.enter_context(Worker(from_socket, options.size, options.tensors, host, address)) for host in hosts]
    connections = [stack.enter_context(listening.accept()[0]) for _ in hosts]

    def send(connected: socket.socket, trainer: nn.Module) -> None:
        for parameter in trainer.parameters():
            connected.sendall(_view(parameter))
        connected.recv(1)

    def run(trainer: nn.Module, value: float) -> float:
        for worker in workers:
            worker.pipe.send(value)
        began = time.perf_counter()
        threads = [threading.Thread(target=send, args=(connected, trainer)) for connected in connections]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - began
        for worker in workers:
            worker.pipe.recv()
        return took

    return run


def ours(
    options: argparse.Namespace,
    hosts: list[str],
    where: tuple[str, int],
    stack: ExitStack,
    *,
    digests: bool,
    keys: str | None = None,
    carrier: str = "sockets",
    encrypt: Any = "control",
) -> Run:
    sender = stack.enter_context(
        hw.Sender(
            f"tcps://{where[0]}:0",
            receivers=len(hosts),
            digests=digests,
            slot_nbytes=options.slot,
            keys=keys,
            insecure=keys is None,
            carrier=carrier,
            encrypt=encrypt,
        )
    )
    workers = [
        stack.enter_context(Worker(receiving, options.size, options.tensors, host, sender.address, keys))
        for host in hosts
    ]

    def run(trainer: nn.Module, value: float) -> float:
        for worker in workers:
            worker.pipe.send(value)
        began = time.perf_counter()
        sender.send(trainer, version=int(value), show_progress=False)
        took = time.perf_counter() - began
        for worker in workers:
            worker.pipe.recv()
        return took

    return run


def measure(options: argparse.Namespace, hosts: list[str], where: tuple[str, int], keys: str | None) -> dict[str, Any]:
    with ExitStack() as stack:
        ways = {
            "socket copy": plain(options, hosts, where, stack),
            "in place": ours(options, hosts, where, stack, digests=False),
            "in place, digests": ours(options, hosts, where, stack, digests=True),
        }
        if keys is not None:
            ways["in place, digests, keys"] = ours(options, hosts, where, stack, digests=True, keys=keys)
            ways["the same, encrypted"] = ours(options, hosts, where, stack, digests=True, keys=keys, encrypt="all")
        trainer = Layers(options.size, options.tensors)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(options.rounds + 2):
            for name, run in ways.items():
                value = float(number % 100 + 1)
                for parameter in trainer.parameters():
                    parameter.fill_(value)
                seconds[name].append(run(trainer, value))
        return {name: statistics.median(found[2:]) for name, found in seconds.items()}


def make_keys(directory: str, host: str) -> str | None:
    try:
        hw_keys = __import__("hotweights.transfer.keys", fromlist=["make_keys"])
        hw_keys.make_keys(directory, [host])
    except hw.MissingPackage:
        return None
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default=parse_size("512MB"))
    parser.add_argument("--slot", type=parse_size, default=4 * 1024 * 1024, help="bytes of a slot")
    parser.add_argument("--tensors", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        if reason := why_not():
            hosts, where, between = ["", ""], "127.0.0.1", f"by loopback: {reason}"
        else:
            made = stack.enter_context(Hosts())
            enter(made.names[2])
            hosts, where, between = made.names[:2], made.addresses[2], "between network namespaces"
        keys = make_keys(stack.enter_context(tempfile.TemporaryDirectory()), where)
        table = Table("", "one receiver", "two receivers, on two hosts", title=f"{options.size / 1e6:.0f} MB {between}")
        one, two = (measure(options, hosts[:count], (where, 0), keys) for count in (1, 2))
        for name in one:
            shown = (f"{found[name] / found['socket copy']:.2f} ({found[name]:.3f} s)" for found in (one, two))
            table.add_row(name, *shown)
        Console().print(table)


if __name__ == "__main__":
    main()
