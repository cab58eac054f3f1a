"""Measures a version's way from a trainer to live parameters on other hosts, against plain socket copies of its bytes.

    python benchmarks/hosts.py                 # 512 MB of bfloat16 in 64 tensors, one and two receivers
    python benchmarks/hosts.py --size 100MB    # quicker; the cost of starting weighs more

Hosts are network namespaces on a switch where this runs as root, else this host by loopback. Each process has one
thread. Ways take turns, round after round; medians are shown. Two updates before them do not count. Every receiver
compares its parameters with what was sent, outside the timing.

* *socket copy*: one TCP connection to each receiver, ``sendall`` from each tensor, ``recv_into`` each parameter.
  Nothing is checked, and whoever dies leaves parameters of two versions.
* *gloo broadcast*: of each tensor from rank 0 by a group of torch.distributed, as vLLM and verl send weights by NCCL;
  straight into the parameters. Nothing is checked, and who is lost hangs all others until a deadline.
* *keys*: control goes through TLS. *Encrypted*: the weights too, by ``encrypt="all"``.

    python benchmarks/hosts.py --relays 1000   # as root: through relays, where links carry 1,000 Mbit/s

That measures one worker of one host behind a relay, two on that host, and one on each of two hosts whose relays follow
one another, without digests; bytes over the network as the sender counts them, and a relay's memory above its slots,
at its most.
"""

from __future__ import annotations

import argparse
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import hotweights as hw
from hotweights.memory.addresses import buffer
from hotweights.transfer.relay import Relay
from load import parse_size
from transfer import Layers, Worker, check

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from namespaces import Hosts, end_once, enter, why_not

Run = Callable[[nn.Module, float], float]
WAIT = timedelta(seconds=60)


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


def gloo_group(rank: int, size: int, here: str, where: tuple[str, int]) -> Any:
    gloo: Any = torch.distributed.ProcessGroupGloo
    options = gloo._Options()
    options._threads, options._timeout = 1, WAIT
    options._devices = [gloo.create_device(hostname=here)]
    store = torch.distributed.TCPStore(*where, size, rank == 0, timeout=WAIT, wait_for_workers=False)
    return gloo(store, rank, size, options)


def broadcast(group: Any, model: nn.Module) -> None:
    from_rank_0 = torch.distributed.BroadcastOptions()
    from_rank_0.rootRank = 0
    for parameter in model.parameters():
        group.broadcast([parameter.detach().view(torch.uint8)], from_rank_0).wait()


def from_broadcast(
    pipe: Connection, nbytes: int, tensors: int, host: str, here: str, rank: int, size: int, where: tuple[str, int]
) -> None:
    if host:
        enter(host)
    model, group = Layers(nbytes, tensors), None
    while (value := pipe.recv()) is not None:
        group = group or gloo_group(rank, size, here, where)
        broadcast(group, model)
        pipe.send("there")
        check(model, value)
        pipe.send("done")


def by_broadcast(options: argparse.Namespace, hosts: list[tuple[str, str]], where: str, stack: ExitStack) -> Run:
    """``hosts``: name and address of each."""
    size, store, group = 1 + len(hosts), (where, 29500 + len(hosts)), None
    workers = [
        stack.enter_context(Worker(from_broadcast, options.size, options.tensors, host, here, rank, size, store))
        for rank, (host, here) in enumerate(hosts, 1)
    ]

    def run(trainer: nn.Module, value: float) -> float:
        nonlocal group
        for worker in workers:
            worker.pipe.send(value)
        group = group or gloo_group(0, size, where, store)
        began = time.perf_counter()
        broadcast(group, trainer)
        for worker in workers:
            worker.pipe.recv()
        took = time.perf_counter() - began
        for worker in workers:
            worker.pipe.recv()
        return took

    return run


def receiving(
    pipe: Connection, nbytes: int, tensors: int, host: str, address: str, keys: str | None, insecure: bool
) -> None:
    if host:
        enter(host)
    live = hw.LiveModel(Layers(nbytes, tensors), atomic=False)
    with hw.Receiver(address, keys=keys, insecure=insecure) as receiver:
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
        stack.enter_context(Worker(receiving, options.size, options.tensors, host, sender.address, keys, keys is None))
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


def relaying(pipe: Connection, host: str, source: str, to: list[str]) -> None:
    enter(host)
    with Relay(source, to, insecure=True) as relay:
        running = threading.Thread(target=relay.run)
        running.start()
        before = resident()
        while pipe.recv() is not None:
            pipe.send(resident() - before)
        relay.close()
        running.join()


def resident() -> int:
    """Bytes of memory that this process has had at most, but for what it shares."""
    words = Path("/proc/self/status").read_text().split()
    return 1024 * (int(words[words.index("VmHWM:") + 1]) - int(words[words.index("RssShmem:") + 1]))


def through(
    options: argparse.Namespace, made: Hosts, stack: ExitStack, counts: list[int]
) -> tuple[Run, Callable[[], tuple[int, int]]]:
    """``counts`` of workers by host, each behind a relay; the second relay follows the first."""
    source, folder = f"tcps://{made.addresses[2]}:0", stack.enter_context(tempfile.TemporaryDirectory())
    sender = hw.Sender(source, receivers=sum(counts), slot_nbytes=options.slot, insecure=True, digests=False)
    stack.enter_context(sender)
    source, relays, workers, networks = sender.address, [], [], []
    for number, count in enumerate(counts):
        name, following = made.names[number], f"tcps://{made.addresses[number]}:{7700 + len(counts)}"
        local = f"unix:{folder}/{number}/socket"
        to = [local, following] if number + 1 < len(counts) else [local]
        relays.append(stack.enter_context(Worker(relaying, name, source, to)))
        source = following
        workers += [
            stack.enter_context(Worker(receiving, options.size, options.tensors, name, local, None, False))
            for _ in range(count)
        ]

    def run(trainer: nn.Module, value: float) -> float:
        for worker in workers:
            worker.pipe.send(value)
        began = time.perf_counter()
        report = sender.send(trainer, version=int(value), show_progress=False)
        took = time.perf_counter() - began
        networks.append(report.network_nbytes)
        for worker in workers:
            worker.pipe.recv()
        return took

    def facts() -> tuple[int, int]:
        for relay in relays:
            relay.pipe.send("memory")
        return networks[-1], max(relay.pipe.recv() for relay in relays)

    return run, facts


def by_relays(options: argparse.Namespace, made: Hosts) -> Table:
    for number in range(3 if options.relays else 0):
        made.limit(number, options.relays)
    with ExitStack() as stack:
        kinds = {"one worker": [1], "two workers of one host": [2], "a chain of two hosts": [1, 1]}
        ways = {name: through(options, made, stack, counts) for name, counts in kinds.items()}
        copy = plain(options, made.names[:1], (made.addresses[2], 0), stack)
        trainer = Layers(options.size, options.tensors)
        seconds = turns({"socket copy": copy} | {name: run for name, (run, _) in ways.items()}, trainer, options.rounds)
        links = f", links of {options.relays} Mbit/s" if options.relays else ""
        title = f"{options.size / 1e6:.0f} MB through relays{links}"
        table = Table("", "seconds", "ratio", "over the network", "a relay above its slots", title=title)
        for name, took in seconds.items():
            network, memory = ways[name][1]() if name in ways else (options.size, 0)
            shown = f"{memory / 1e6:.0f} MB" if name in ways else ""
            table.add_row(name, f"{took:.3f}", f"{took / seconds['socket copy']:.2f}", f"{network / 1e6:.0f} MB", shown)
        return table


def turns(ways: dict[str, Run], trainer: nn.Module, rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, run in ways.items():
            value = float(number % 100 + 1)
            for parameter in trainer.parameters():
                parameter.fill_(value)
            seconds[name].append(run(trainer, value))
    return {name: statistics.median(found[2:]) for name, found in seconds.items()}


def measure(
    options: argparse.Namespace, named: list[tuple[str, str]], where: tuple[str, int], keys: str | None
) -> dict[str, Any]:
    hosts = [host for host, _ in named]
    with ExitStack() as stack:
        ways = {
            "socket copy": plain(options, hosts, where, stack),
            "gloo broadcast": by_broadcast(options, named, where[0], stack),
            "in place": ours(options, hosts, where, stack, digests=False),
            "in place, digests": ours(options, hosts, where, stack, digests=True),
        }
        if keys is not None:
            ways["in place, digests, keys"] = ours(options, hosts, where, stack, digests=True, keys=keys)
            ways["the same, encrypted"] = ours(options, hosts, where, stack, digests=True, keys=keys, encrypt="all")
        trainer = Layers(options.size, options.tensors)
        return turns(ways, trainer, options.rounds)


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
    parser.add_argument("--slot", type=parse_size, help="bytes of a slot; 16 MiB as they come")
    parser.add_argument("--tensors", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--relays", type=int, metavar="MBIT", help="measure relays, with links of so many Mbit/s; 0 is no limit"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # No namespace is left behind.
        signal.signal(number, end_once)
    with ExitStack() as stack:
        if reason := why_not():
            hosts, where, between = [("", "127.0.0.1")] * 2, "127.0.0.1", f"by loopback: {reason}"
        else:
            made = stack.enter_context(Hosts())
            enter(made.names[2])
            if options.relays is not None:
                Console().print(by_relays(options, made))
                return
            hosts, where, between = (
                list(zip(made.names, made.addresses, strict=True))[:2],
                made.addresses[2],
                "between network namespaces",
            )
        keys = make_keys(stack.enter_context(tempfile.TemporaryDirectory()), where)
        table = Table("", "one receiver", "two receivers, on two hosts", title=f"{options.size / 1e6:.0f} MB {between}")
        one, two = (measure(options, hosts[:count], (where, 0), keys) for count in (1, 2))
        for name in one:
            shown = (f"{found[name] / found['socket copy']:.2f} ({found[name]:.3f} s)" for found in (one, two))
            table.add_row(name, *shown)
        Console().print(table)


if __name__ == "__main__":
    main()
