"""A trainer refits a vLLM engine while things go wrong: by vLLM's own NCCL backend, and by ours. A table.

    python benchmarks/refit_faults.py
    python benchmarks/refit_faults.py --only shape

It needs an environment with vllm on a CPU (``make test-vllm`` makes one). vLLM's own backends need CUDA: here its NCCL
engines, both ends, run as they are but for the group, which is gloo's, and the stream, which there is none of. So what
they do with a version is theirs, and what becomes of a dead peer is gloo's: NCCL would not notice one.

Each fault has an engine of its own, which holds A; the trainer sends B and fails. Then it is asked (its prefix cache is
emptied before), and another trainer sends B as it should be.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "vllm"))

import cases
from drive import OURS, Talker, Zoo
from rich.console import Console
from rich.table import Table
from trainers import caught, trained, trainer_of

FAULTS = ("nothing", "missing", "half of a fused one", "shape", "the source raises", "the trainer is killed")
PATIENCE = 30.0
"""Seconds after which an engine counts as dead."""

cases.MORE["llama-200MB"] = cases.Case(
    "LlamaConfig",
    {
        **cases._BASE,
        "vocab_size": 8000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "initializer_range": 0.02,
    },
)


class Group:
    """What vLLM's NCCL engines ask of a communicator, by gloo."""

    def __init__(self, port: int, rank: int, size: int) -> None:
        import torch.distributed as dist

        store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
        self._group = dist.ProcessGroupGloo(store, rank, size)

    def broadcast(self, tensor: Any, src: int, stream: object = None) -> None:
        import torch.distributed as dist

        options = dist.BroadcastOptions()
        options.rootRank = src
        self._group.broadcast([tensor.detach()], options).wait()

    def destroy(self) -> None:
        """The group ends with its process."""


def without_cuda() -> None:
    """Put the group into vLLM's NCCL engines, in this process."""
    import torch
    from vllm.distributed.weight_transfer import nccl_engine

    nccl_engine.worker_init_process_group = lambda info, parallel: Group(info.master_port, 1, 2)
    nccl_engine.open_trainer_endpoint = lambda info: Group(info.master_port, 0, 2)
    torch.cuda.current_stream = lambda *_: None
    torch.accelerator.synchronize = lambda *_: None


def serve(talker: Talker, pipe: Any) -> None:
    """An engine that does what it is told."""
    from hotweights.engines.vllm import LLMClient

    client = LLMClient(talker.llm)

    def tokens() -> Any:
        talker.llm.reset_prefix_cache(True)
        talker.llm.wake_up(["scheduling"])
        return talker.tokens()

    while True:
        try:
            number, what, given = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((number, tokens() if what == "tokens" else getattr(client, what)(*given)))
        except Exception as error:
            pipe.send((number, RuntimeError(f"{type(error).__name__}: {error}")))


class Remote:
    """vLLM's client of an engine in another process. Notes how long updates took."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.stalls, self._began = pipe, [], 0.0

    def ask(self, what: str, *given: Any) -> Any:
        number = time.monotonic_ns()
        self.pipe.send((number, what, given))
        answered, answer = 0, None
        while answered != number:  # Those before it are of a trainer that was killed.
            if not self.pipe.poll(PATIENCE):
                raise TimeoutError(f"the engine did not answer {what} in {PATIENCE:g} s")
            answered, answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def world_size(self) -> int:
        return int(self.ask("world_size"))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.ask("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self._began = time.monotonic()
        self.ask("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.ask("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.ask("finish_weight_update", weight_version)
        self.stalls.append(time.monotonic() - self._began)


def source_of(model: Any, fault: str) -> Any:
    """The model's tensors, with something wrong."""
    from vllm.distributed.weight_transfer.base import ModuleSource, ParamMeta

    class Faulty(ModuleSource):  # type: ignore[misc]
        def _changed(self) -> Iterator[tuple[str, Any]]:
            last = max(name for name, _ in model.named_parameters() if "norm" in name)
            for name, tensor in super().__iter__():
                part = ".0." in name and ("k_proj" in name or "v_proj" in name)
                if (fault == "missing" and name == last) or (fault == "half of a fused one" and part):
                    continue
                yield name, tensor[:, 1:] if fault == "shape" and "layers.0.self_attn.o_proj" in name else tensor

        def metadata(self) -> list[Any]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._changed()]

        def __iter__(self) -> Iterator[tuple[str, Any]]:
            for number, (name, tensor) in enumerate(self._changed()):
                if number == 8 and fault == "the source raises":
                    raise RuntimeError("the gather failed")
                if number == 8 and fault == "the trainer is killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                yield name, tensor

    return Faulty(model)


def sender_of(client: Any, source: Any, is_ours: bool, timeout: float = 20) -> Any:
    """A trainer as a user makes one, of either backend."""
    if is_ours:
        return trainer_of(client, source, timeout=timeout)
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    without_cuda()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    info = NCCLTrainerInitInfo(rank=0, master_address="127.0.0.1", master_port=port, world_size=2, packed=False)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)


def trainer(path: str, fault: str, is_ours: bool, pipe: Any) -> str:
    """A trainer's life: what it was told."""
    return caught(sender_of(Remote(pipe), source_of(trained(path), fault), is_ours).send_weights)


def ended(zoo: Zoo, script: Callable[..., Any], *given: Any) -> Any:
    """What a process returned, or how it ended."""
    try:
        return zoo.run(script, None, *given, seconds=3 * PATIENCE)
    except EOFError:
        return "killed"
    except AssertionError as error:
        return str(error).strip().splitlines()[-1].replace("the engine", "the trainer")


def engine(zoo: Zoo, name: str, is_ours: bool) -> Any:
    """One in a process of its own, which holds A."""
    options = {**OURS, "weight_transfer_config": {"backend": "hotweights"}}
    if not is_ours:
        options = {"weight_transfer_config": {"backend": "nccl"}}
    before = None if is_ours else without_cuda
    return zoo.serving(serve, zoo.checkpoint(name, "A"), options=options, before=before)


def fault_row(zoo: Zoo, fault: str, is_ours: bool) -> list[str]:
    """What the trainer was told, what the engine says then, and what it says after the next refit."""
    said = {zoo_name: zoo.fresh("llama", zoo_name) for zoo_name in "AB"}

    def answers(pipe: Any) -> str:
        try:
            tokens = Remote(pipe).ask("tokens")
        except Exception as error:
            return f"no answer ({str(error).splitlines()[0][:60]})"
        return next((name for name, right in said.items() if tokens == right), "neither A nor B")

    path = str(zoo.checkpoint("llama", "B"))
    with engine(zoo, "llama", is_ours) as pipe:
        told = ended(zoo, trainer, path, fault, is_ours, pipe)
        then = answers(pipe)
        if then.startswith("no answer (the engine did not"):
            return [told.splitlines()[0][:90], then, "-"]
        again = ended(zoo, trainer, path, "nothing", is_ours, pipe)
        after = answers(pipe)
    return [told.splitlines()[0][:90], then, after if again == "nothing was raised" else f"{again[:60]}; {after}"]


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", choices=FAULTS, help="one of them")
    only = arguments.parse_args().only
    os.environ.update(Zoo.environment)
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests" / "vllm")]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    console = Console(width=200)
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo(Path(folder))
        table = Table("fault", "backend", "the trainer is told", "the engine says", "and after the next refit, with B")
        for fault in FAULTS:
            for is_ours in (False, True):
                if only in (None, fault):
                    row = (fault, "ours" if is_ours else "nccl", *fault_row(zoo, fault, is_ours))
                    table.add_row(*row)
                    print("done:", *row, sep=" | ", file=sys.stderr, flush=True)
        console.print(table)


if __name__ == "__main__":
    main()
