"""Measures a version's way from a trainer to live parameters in other processes, against plain copies of its bytes.

    python benchmarks/transfer.py                  # 1.7 GB of bfloat16 in 145 tensors, one and two receivers
    python benchmarks/transfer.py --verl PATH      # the same beside verl's bucketed transfer, from a checkout of verl
    python benchmarks/transfer.py --size 200MB     # quicker; the cost of starting weighs more

Each process has one thread. Ways take turns, round after round; medians are shown. What a way does only once (greeting,
planning, mapping the slots, touching memory) is in two updates that do not count. Every receiver compares its
parameters with what was sent, outside the timing.

* *plain copy*: ``parameter.copy_(tensor)`` for all tensors, in as many processes at once as there are receivers.
* *POSIX shared memory*: the control. Two buckets of ``multiprocessing.shared_memory``, pipes for signals, no checks.
* *verl, 128 MB*: ``BucketedWeightSender`` and ``BucketedWeightReceiver`` of the checkout, over shared memory, with a
  callback that copies into the parameters; its device module is replaced by one for the CPU. It goes from one to one.
  It needs pyzmq.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import hotweights as hw
from isolate import wait_for_quiet
from load import parse_size

WAYS = {"in place (False)": False, "staged": "staged", "journal": "journal"}
BUCKET = 16 * 1024 * 1024
_fork = multiprocessing.get_context("fork")


class Layers(nn.Module):
    """Layers of one weight each, of ``nbytes`` together."""

    def __init__(self, nbytes: int, tensors: int, value: float = 0.0) -> None:
        super().__init__()
        shape = (nbytes // tensors // 2 // 1024, 1024)
        weights = (torch.full(shape, value, dtype=torch.bfloat16) for _ in range(tensors))
        self.layers = nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in weights)


def check(model: nn.Module, value: float) -> None:
    four = torch.full((4,), value, dtype=torch.bfloat16).view(torch.int64)  # compared by fours, four times as fast
    if any(not bool((parameter.view(torch.int64) == four).all()) for parameter in model.parameters()):
        raise RuntimeError("wrong values")


class Worker:
    """A forked process that does one thing for each version, when it is told to."""

    def __init__(self, work: Callable[..., Any], *arguments: Any) -> None:
        self.pipe, theirs = _fork.Pipe()
        self._process = _fork.Process(target=work, args=(theirs, *arguments), daemon=True)
        self._process.start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.pipe.send(None)
        self._process.join(30)


def copying(pipe: Connection, nbytes: int, tensors: int) -> None:
    model, source = Layers(nbytes, tensors), Layers(nbytes, tensors, 1.0)
    while (value := pipe.recv()) is not None:
        for parameter in source.parameters():
            parameter.fill_(value)
        pipe.send("ready")
        pipe.recv()
        for parameter, new in zip(model.parameters(), source.parameters(), strict=True):
            parameter.copy_(new)
        pipe.send("done")


def receiving(pipe: Connection, nbytes: int, tensors: int, address: str, atomic: Any) -> None:
    live = hw.LiveModel(Layers(nbytes, tensors), atomic=atomic)
    with hw.Receiver(address) as receiver:
        while (value := pipe.recv()) is not None:
            live.load(receiver) if live.version is None else live.update(receiver)
            check(live.model, value)
            pipe.send("done")


def from_buckets(pipe: Connection, nbytes: int, tensors: int, memories: list[SharedMemory]) -> None:
    model = Layers(nbytes, tensors)
    into = [parameter.view(-1).view(torch.uint8) for parameter in model.parameters()]
    while (value := pipe.recv()) is not None:
        for parameter in into:
            for start in range(0, parameter.numel(), BUCKET):
                bucket = pipe.recv()
                piece = parameter[start : start + BUCKET]
                piece.copy_(torch.frombuffer(memories[bucket].buf, dtype=torch.uint8, count=piece.numel()))
                pipe.send(bucket)
        pipe.send("done")
        check(model, value)
        pipe.send("checked")


def plain(nbytes: int, tensors: int, receivers: int, stack: ExitStack) -> Callable[[nn.Module, float], float]:
    workers = [stack.enter_context(Worker(copying, nbytes, tensors)) for _ in range(receivers)]

    def run(trainer: nn.Module, value: float) -> float:
        for order in (value, "go"):
            began = time.perf_counter()
            for worker in workers:
                worker.pipe.send(order)
            for worker in workers:
                worker.pipe.recv()
        return time.perf_counter() - began

    return run


def ours(
    nbytes: int, tensors: int, receivers: int, stack: ExitStack, *, atomic: Any, digests: bool
) -> Callable[[nn.Module, float], float]:
    address = f"unix:{stack.enter_context(tempfile.TemporaryDirectory())}/socket"
    workers = [stack.enter_context(Worker(receiving, nbytes, tensors, address, atomic)) for _ in range(receivers)]
    sender = stack.enter_context(hw.Sender(address, receivers=receivers, digests=digests))

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


def posix(nbytes: int, tensors: int, receivers: int, stack: ExitStack) -> Callable[[nn.Module, float], float]:
    memories = [SharedMemory(create=True, size=BUCKET) for _ in range(2)]
    for memory in memories:
        stack.callback(memory.unlink)
    workers = [stack.enter_context(Worker(from_buckets, nbytes, tensors, memories)) for _ in range(receivers)]

    def run(trainer: nn.Module, value: float) -> float:
        for worker in workers:
            worker.pipe.send(value)
        began = time.perf_counter()
        unread = [0, 0]
        bucket = 0
        for tensor in trainer.parameters():
            raw = tensor.view(-1).view(torch.uint8)
            for start in range(0, raw.numel(), BUCKET):
                while unread[bucket]:
                    for worker in workers:
                        unread[worker.pipe.recv()] -= 1
                piece = raw[start : start + BUCKET]
                torch.frombuffer(memories[bucket].buf, dtype=torch.uint8, count=piece.numel()).copy_(piece)
                unread[bucket] = receivers
                for worker in workers:
                    worker.pipe.send(bucket)
                bucket = 1 - bucket
        for worker in workers:
            while worker.pipe.recv() != "done":
                pass
        took = time.perf_counter() - began
        for worker in workers:
            worker.pipe.recv()
        return took

    return run


VERL = "verl/workers/rollout/vllm_rollout/bucketed_weight_transfer.py"


def verl_module(checkout: Path) -> Any:
    """verl's file as it is, over a device module and a helper of our own that know the CPU."""
    stubs = {name: ModuleType(name) for name in ("verl", "verl.utils", "verl.utils.device", "verl.workers")}
    stubs |= {name: ModuleType(name) for name in ("verl.workers.rollout", "verl.workers.rollout.utils")}
    nothing = ModuleType("cpu")
    for name in ("synchronize", "ipc_collect", "empty_cache"):
        setattr(nothing, name, lambda: None)
    device: Any = stubs["verl.utils.device"]
    device.get_device_id, device.get_device_name, device.get_torch_device = lambda: 0, lambda: "cpu", lambda: nothing
    device.is_support_ipc = lambda: False
    helper: Any = stubs["verl.workers.rollout.utils"]
    helper.ensure_async_iterator = one_by_one
    sys.modules.update(stubs)
    spec = importlib.util.spec_from_file_location("bucketed_weight_transfer", checkout / VERL)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


async def one_by_one(pairs: Iterable[Any]) -> AsyncIterator[Any]:
    for pair in pairs:
        yield pair


def from_verl(pipe: Connection, nbytes: int, tensors: int, checkout: Path, handle: str) -> None:
    model, module = Layers(nbytes, tensors), verl_module(checkout)
    parameters = dict(model.named_parameters())

    def load(weights: list[tuple[str, torch.Tensor]], *_: object) -> None:  # Of late it is told which is the last.
        for name, tensor in weights:
            parameters[name].copy_(tensor)

    while (value := pipe.recv()) is not None:
        module.BucketedWeightReceiver(handle, torch.device("cpu"), use_shm=True).receive_weights(load)
        pipe.send("done")
        check(model, value)
        pipe.send("checked")


def verl(
    nbytes: int, tensors: int, checkout: Path, megabytes: int, stack: ExitStack
) -> Callable[[nn.Module, float], float]:
    handle = f"ipc://{stack.enter_context(tempfile.TemporaryDirectory())}/socket"
    worker = stack.enter_context(Worker(from_verl, nbytes, tensors, checkout, handle))
    module = verl_module(checkout)

    def run(trainer: nn.Module, value: float) -> float:
        worker.pipe.send(value)
        began = time.perf_counter()
        sender = module.BucketedWeightSender(handle, bucket_size_mb=megabytes, use_shm=True)
        asyncio.run(sender.async_send_weights(trainer.named_parameters()))
        worker.pipe.recv()
        took = time.perf_counter() - began
        worker.pipe.recv()
        return took

    return run


def measure(options: argparse.Namespace, receivers: int) -> dict[str, list[float]]:
    nbytes, tensors = options.size, options.tensors
    makes: dict[str, Callable[[ExitStack], Callable[[nn.Module, float], float]]] = {
        "plain copy": lambda stack: plain(nbytes, tensors, receivers, stack),
        "POSIX shared memory": lambda stack: posix(nbytes, tensors, receivers, stack),
    }
    for way in options.ways if receivers == 1 else options.ways[:1]:
        for digests in (False, True):
            makes[f"{way}{', digests' if digests else ''}"] = lambda stack, way=way, digests=digests: ours(
                nbytes, tensors, receivers, stack, atomic=WAYS[way], digests=digests
            )
    for megabytes in options.buckets if options.verl is not None and receivers == 1 else ():
        makes[f"verl, {megabytes} MB"] = lambda stack, megabytes=megabytes: verl(
            nbytes, tensors, options.verl, megabytes, stack
        )
    seconds: dict[str, list[float]] = {name: [] for name in makes}
    value = 0.0
    trainer = Layers(nbytes, tensors)
    for _ in range(options.repeats):
        for name, make in makes.items():
            with ExitStack() as stack:  # One way's processes at a time: they hold a model each.
                run = make(stack)
                for counted in (False, False, True, True):  # The first update makes the copy of the model.
                    value = value % 100 + 1
                    for parameter in trainer.parameters():
                        parameter.fill_(value)
                    if counted:
                        wait_for_quiet(1.0)
                    took = run(trainer, value)
                    if counted:
                        seconds[name].append(took)
    return seconds


def table(seconds: dict[str, list[float]], options: argparse.Namespace, receivers: int) -> Table:
    base = statistics.median(seconds["plain copy"])
    title = f"{options.size / 1e9:.1f} GB in {options.tensors} tensors to {receivers} receiver(s)"
    result = Table(title=title)
    for heading in ("", "seconds", "spread", "x plain"):
        result.add_column(heading, justify="left" if not heading else "right")
    for name, took in seconds.items():
        middle = statistics.median(took)
        result.add_row(name, f"{middle:.3f}", f"{min(took):.3f}..{max(took):.3f}", f"{middle / base:.2f}")
    return result


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default="1.7GB", help="bytes of the model (1.7GB)")
    parser.add_argument("--tensors", type=int, default=145, help="tensors in it (145)")
    parser.add_argument("--repeats", type=int, default=2, help="rounds, two updates each (2)")
    parser.add_argument("--verl", type=Path, help=f"a checkout of verl, with {VERL}")
    parser.add_argument("--buckets", type=int, nargs="+", default=[128, 512, 2048], help="verl's, in MB (128 512 2048)")
    parser.add_argument("--receivers", type=int, nargs="+", default=[1, 2], help="how many at once (1 2)")
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=list(WAYS)[:2],
        help="how updates are all or nothing; the first of them only, where there is more than one receiver",
    )
    return parser.parse_args(arguments)


def main(arguments: Iterable[str] | None = None) -> None:
    options = parse(None if arguments is None else list(arguments))
    torch.set_num_threads(1)
    with torch.no_grad():
        for receivers in options.receivers:
            Console().print(table(measure(options, receivers), options, receivers))


if __name__ == "__main__":
    main()
