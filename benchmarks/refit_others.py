"""How long refits take beside stock, of stacks that other environments have: checkpoint-engine, SGLang and NeMo-RL.

    python benchmarks/refit_others.py checkpoint-engine                # where ``make test-verl`` has installed
    python benchmarks/refit_others.py sglang --rounds 9                # ``make test-sglang``
    python benchmarks/refit_others.py nemo-rl --nemo-rl DIR            # any, with ray, pyzmq and nixl; DIR has NeMo-RL

200 MB each, in turns of random order, each way in processes of its own, and two refits before those that count. A ratio
is the median over rounds of one round's times, ours by stock's; the load of the machine stands beside it.

* checkpoint-engine: its parameter server and its worker extension in an engine of vLLM, with a stand-in for the device.
  vLLM packs no weights for its kernels, in neither engine: stock cannot write into packed ones.
* SGLang: its ``WeightUpdater`` and its scheduler's manager around a toy model, in four calls; no server is there. It
  steps in none of the calls, so the stall is all of it.
* NeMo-RL: its NIXL engine with its transfer buffers on the CPU, and ours; a rollout copies what comes into its tensors.
  What vLLM makes of it is the same in both. Each version is connected and finalised, as NeMo-RL does.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from rich.console import Console

from turns import Way, measured, process, table

WINGS = {"checkpoint-engine": ("checkpoint_engine", "vllm"), "sglang": ("sglang",), "nemo-rl": ()}
"""Where in ``tests/`` the parts of a stack lie."""
LAYERS, WIDTH = 8, 1448
"""Of the toy model: three squares of float32 in each layer, 200 MB in all."""
CALLS = 4
BUCKET_NBYTES = 64 << 20


def parameter_server(paths: list[str], pipe: Any) -> None:
    """checkpoint-engine's, which updates whoever the pipe asks for, with one checkpoint after the other."""
    import transformers
    from parameter_server import prepared, shared

    states = {path: transformers.AutoModelForCausalLM.from_pretrained(path).state_dict() for path in paths}
    server = prepared(states, buckets=4)
    while True:
        try:
            path = pipe.recv()
        except EOFError:
            return
        began = time.monotonic()
        server.update(path, pipe.send)
        pipe.send(time.monotonic() - began)
        for memory in shared.values():
            memory.unlink()
        shared.clear()


def by_checkpoint_engine(paths: list[str], is_ours: bool) -> Way:
    """An engine of vLLM that takes two checkpoints in turn."""
    from vllm import LLM, SamplingParams, _custom_ops

    _custom_ops._supports_onednn = False
    llm = LLM(
        paths[0],
        load_format="hotweights" if is_ours else "auto",
        worker_extension_cls=f"worker_on_cpu.{'WorkerOnCPU' if is_ours else 'StockOnCPU'}",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        max_num_batched_tokens=256,
        max_num_seqs=8,
        dtype="bfloat16",
        kv_cache_memory_bytes=64 << 20,
    )
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=parameter_server, args=(paths, theirs), daemon=True).start()
    theirs.close()
    says: dict[str, list[int]] = {}
    count = 0

    def way() -> tuple[float, float]:
        nonlocal count
        count += 1
        path = paths[count % 2]
        ours.send(path)
        ((_, address),) = ours.recv()
        began = time.monotonic()
        llm.collective_rpc("update_weights_from_ipc", args=({"cpu": address},))
        stall = time.monotonic() - began
        total = ours.recv()
        llm.reset_prefix_cache()
        (out,) = llm.generate([{"prompt_token_ids": [*range(5, 45)]}], greedy, use_tqdm=False)
        says.setdefault(path, [*out.outputs[0].token_ids])
        assert says[path] == [*out.outputs[0].token_ids]
        assert len(says) == 1 or says[paths[0]] != says[paths[1]]
        return stall, total

    return way


def by_sglang(folder: str, is_ours: bool) -> Way:
    """SGLang's manager and updater around a toy model of several layers."""
    importlib.import_module("conftest")  # First: it stands for what SGLang imports and this machine has not.
    import pytest
    import test_updates
    import torch
    from safetensors.torch import save_file
    from sglang.srt.plugins import load_plugins
    from torch import nn
    from toy_model import Runner, Toy, loaded, weights_of

    import hotweights.engines.sglang.loader as loader

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Toy(WIDTH) for _ in range(LAYERS))

        def load_weights(self, weights: Any) -> None:
            for name, tensor in weights:
                _, number, rest = name.split(".", 2)
                self.layers[int(number)].load_weights([(rest, tensor)])

    def weights(seed: int) -> dict[str, Any]:
        return {
            f"layers.{number}.{name}": tensor
            for number in range(LAYERS)
            for name, tensor in weights_of(seed + number, WIDTH).items()
        }

    load_plugins()
    patch = pytest.MonkeyPatch()
    test_updates.join(patch, torch.distributed.HashStore())
    patch.setattr(loader, "_initialize_model", lambda *_: Layers())
    versions = [weights(0), weights(LAYERS)]
    if is_ours:
        save_file(versions[0], Path(folder, "model.safetensors"))
        Path(folder, "config.json").write_text("{}")
        runner = loaded(folder)
    else:
        runner = Runner(Layers(), folder)
    engine = test_updates.Engine(runner)
    calls = [dict([*version.items()][start::CALLS]) for version in versions for start in range(CALLS)]
    count = 0

    def way() -> tuple[float, float]:
        nonlocal count
        count += 1
        version = count % 2
        began = time.monotonic()
        answers = [engine.begin(), *(engine.send(call) for call in calls[version * CALLS : (version + 1) * CALLS])]
        answers.append(engine.end())
        seconds = time.monotonic() - began
        assert all(answer.success for answer in answers), answers
        for number, layer in enumerate(runner.model.layers):
            query = versions[version][f"layers.{number}.q.weight"]
            assert torch.equal(layer.qk.packed[:, :WIDTH].t(), query), "what is derived of the weights is new, too"
        return seconds, seconds

    return way


def nemo_engine(is_ours: bool) -> Any:
    """As NeMo-RL makes it."""
    from nemo_rl.utils.checkpoint_engines.base import create_checkpoint_engine

    backend = "hotweights.engines.nemo_rl:NemoEngine" if is_ours else "nixl"
    options: dict[str, Any] = {} if is_ours else {"device": "cpu"}
    return create_checkpoint_engine(backend, bucket_size_bytes=BUCKET_NBYTES, engine_kwargs=options)


def rollout(is_ours: bool, pipe: Any) -> None:
    """A generation worker of NeMo-RL: tensors are copied into the ones that it has."""
    import torch

    engine = nemo_engine(is_ours)
    held = {name: torch.empty_like(tensor) for name, tensor in version_of(0.0)}

    async def taken() -> None:
        async for batch in engine.receive_weight_batches():
            for name, tensor in batch:
                held[name].copy_(tensor)

    while True:
        pipe.send(engine.prepare())
        try:
            metadata = pipe.recv()
        except EOFError:
            return
        began = time.monotonic()
        engine.init_rollout_process_group(rollout_rank=0, train_world_size=1, rollout_world_size=1, metadata=metadata)
        pipe.send("connected")
        pipe.recv()
        asyncio.run(taken())
        pipe.send((time.monotonic() - began, {float(tensor[-1, -1]) for tensor in held.values()}))
        engine.finalize()


def version_of(value: float) -> Iterator[tuple[str, Any]]:
    """What a policy gives: 48 tensors of float32, 200 MB."""
    import torch

    for number in range(48):
        yield f"layers.{number}.weight", torch.full((1024, 1024), value)


def by_nemo_rl(nemo_rl: str, is_ours: bool) -> Way:
    """A policy's rank, and a rollout in a process of its own."""
    sys.path.insert(0, nemo_rl)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=rollout, args=(is_ours, theirs), daemon=True).start()
    theirs.close()
    engine = nemo_engine(is_ours)
    count = 0

    def way() -> tuple[float, float]:
        nonlocal count
        count += 1
        state = [*version_of(float(count))]
        metadata = [{**engine.prepare(), "rank": 0}, {**ours.recv(), "rank": 0}]
        began = time.monotonic()
        ours.send(metadata)
        engine.init_policy_process_group(worker_rank=0, train_world_size=1, rollout_world_size=1, metadata=metadata)
        ours.recv()
        ours.send("go")  # NeMo-RL waits for both, too, before it sends.
        asyncio.run(engine.send_weights(iter(state)))
        stall, found = ours.recv()
        total = time.monotonic() - began
        engine.finalize()
        assert found == {float(count)}
        return stall, total

    return way


def main() -> None:
    """Print a table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("stack", choices=("checkpoint-engine", "sglang", "nemo-rl"))
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--nemo-rl", metavar="DIR", help="a clone of NeMo-RL, which no registry has")
    options = arguments.parse_args()
    if options.stack == "nemo-rl" and not options.nemo_rl:
        arguments.error("nemo-rl needs --nemo-rl DIR, a clone of NeMo-RL")
    tests = Path(__file__).parent.parent / "tests"
    sys.path[:0] = [str(tests / wing) for wing in WINGS[options.stack]]
    os.environ.update(PYTHONWARNINGS="ignore", VLLM_LOGGING_LEVEL="ERROR", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", GLOO_SOCKET_IFNAME="lo")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ways = {}
        for name, is_ours in ((options.stack, False), ("hotweights", True)):
            if options.stack == "checkpoint-engine":
                from drive import Zoo

                import refit_faults  # noqa: F401  # It adds the model to those of the tests.

                paths = [str(Zoo(Path(folder)).checkpoint("llama-200MB", weights)) for weights in "AB"]
                way = process(by_checkpoint_engine, paths, is_ours)
            elif options.stack == "sglang":
                way = process(by_sglang, folder, is_ours)
            else:
                way = process(by_nemo_rl, options.nemo_rl, is_ours)
            ways[name] = stack.enter_context(way)
        found = measured(ways, options.rounds)
    Console(width=120).print(table(f"{options.stack}, 200 MB", found, options.stack))


if __name__ == "__main__":
    main()
