"""Compares planned loading with vLLM's own, on vLLM's model classes: tiny models with random weights, on the CPU.

    python benchmarks/vllm_plans.py                          # every architecture; two ranks of Llama and Qwen3-MoE
    python benchmarks/vllm_plans.py --only llama,mixtral --json out.json

It needs an environment with vllm and transformers, and no engine: it builds the model object, as vLLM's loaders do, and
never processes it. Two equal models with the same bytes in them are loaded, one by the model's ``load_weights``, the
other by ``hotweights.load``; then every parameter and every buffer is compared, bit for bit. The other is loaded from
files, once more over that, from an in-memory mapping, and with all its bytes garbled before. Each group of ranks is
processes of its own.

*needed* is what the plan's steps take of the checkpoint's bytes, *read* what was read: runs shorter than 512 bytes, as
in models this tiny, are read with what lies between them. Times are of the Python alone, as the models are tiny:
*trace* of ``hotweights.trace``, *own* of the model's ``load_weights`` with tensors in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import nn

import hotweights as hw
from hotweights.plan.steps import Copy, Program

# Buffers of vLLM's attention that checkpoints rarely carry: scales of the KV cache, with defaults.
ATTENTION_SCALES = ("*._k_scale", "*._v_scale", "*._q_scale", "*._prob_scale")

_BASE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_MOE = {**_BASE, "head_dim": 64, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
_MAMBA = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "initializer_range": 0.2,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True)
class Architecture:
    """A tiny model.

    Attributes:
        config: the class in transformers.
        options: for its constructor.
        allow_missing: what vLLM's own loading leaves unwritten, and rightly, beside ``ATTENTION_SCALES``.
        allow_partial: what it writes only some bytes of.
    """

    config: str
    options: Mapping[str, Any]
    allow_missing: Sequence[str] = ()
    allow_partial: Sequence[str] = ()


ARCHITECTURES = {
    "llama": Architecture("LlamaConfig", {**_BASE, "vocab_size": 1000}),
    "qwen3 tied": Architecture("Qwen3Config", {**_BASE, "head_dim": 64, "tie_word_embeddings": True}),
    "mixtral": Architecture("MixtralConfig", {**_BASE, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3-moe": Architecture("Qwen3MoeConfig", {**_MOE, "decoder_sparse_step": 1, "norm_topk_prob": True}),
    "gemma3": Architecture(
        "Gemma3TextConfig", {**_BASE, "head_dim": 64, "sliding_window": 64, "tie_word_embeddings": True}
    ),
    "gpt-oss": Architecture(
        "GptOssConfig",
        {**_BASE, "head_dim": 64, "intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "mamba2": Architecture(
        "Mamba2Config", {**_MAMBA, "num_heads": 8, "head_dim": 64, "state_size": 32, "n_groups": 2, "expand": 2}
    ),
    "nemotron-h": Architecture(
        "NemotronHConfig",
        {
            **_MAMBA,
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
            "intermediate_size": 512,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "mamba_num_heads": 8,
            "mamba_head_dim": 64,
            "ssm_state_size": 32,
            "n_groups": 2,
        },
    ),
}


@dataclass
class Result:
    """What one rank found for one architecture."""

    name: str
    rank: int = 0
    ranks: int = 1
    error: str = ""
    tensors: int = 0
    nbytes: int = 0
    equal: int = 0
    differing: dict[str, list[str]] = field(default_factory=dict)  # by road
    unwritten: list[str] = field(default_factory=list)  # what vLLM's own loading leaves as it was
    copies: int = 0
    slices: int = 0
    programs: int = 0
    fallback: int = 0
    skipped: int = 0
    notes: list[str] = field(default_factory=list)
    side_effects: list[str] = field(default_factory=list)
    state_read: list[str] = field(default_factory=list)
    bytes_needed: int = 0
    bytes_read: int = 0
    trace: float = 0.0
    own: float = 0.0


def make(architecture: Architecture, directory: Path) -> None:
    """Write a checkpoint of random weights in several shards."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, architecture.config)(**architecture.options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # Norms are ones; a wrong one would not be seen.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory, max_shard_size="2MB")


def build(directory: Path, ranks: int) -> Callable[[], nn.Module]:
    """What makes vLLM's model object for a checkpoint, as its loaders would, without weights."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    def model() -> nn.Module:
        options = EngineArgs(
            model=str(directory),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=8,
            max_num_batched_tokens=256,
            tensor_parallel_size=ranks,
            distributed_executor_backend="mp" if ranks > 1 else "uni",
        )
        config = options.create_engine_config()
        with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
            return initialize_model(config).eval()

    return model


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def garble(model: nn.Module, seed: int) -> None:
    """Random bits in every parameter: what is not written shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.numel():
            raw = parameter.data.view(-1).view(torch.uint8)
            raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=generator))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: bits(tensor).clone() for name, tensor in tensors_of(model).items()}


def differences(model: nn.Module, expected: Mapping[str, torch.Tensor]) -> list[str]:
    tensors = tensors_of(model)
    return [
        f"{name}: {int((bits(tensors[name]) != expected[name]).sum())} of {expected[name].numel()} bytes"
        if name in tensors and bits(tensors[name]).shape == expected[name].shape
        else f"{name}: gone, new, or of another size"
        for name in sorted(tensors.keys() | expected.keys())
        if name not in tensors or name not in expected or not torch.equal(bits(tensors[name]), expected[name])
    ]


def fastest(*works: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each, the least of several runs; they take turns."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, times in zip(works, seconds, strict=True):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    return [min(times) for times in seconds]


def needed(plan: hw.LoadPlan, manifest: hw.Manifest) -> int:
    """Bytes that the steps of a plan take from its sources."""
    return sum(
        (step.of.nbytes if step.of is not None else manifest[step.source].nbytes)
        if isinstance(step, Copy)
        else sum(manifest[name].nbytes for name in step.sources)
        for step in plan.steps
    )


def examine(name: str, directory: Path, rank: int, ranks: int, repeats: int) -> Result:
    """Everything about one architecture."""
    architecture = ARCHITECTURES[name]
    allowed = {
        "allow_missing": (*ATTENTION_SCALES, *architecture.allow_missing),
        "allow_partial": architecture.allow_partial,
    }
    model = build(directory, ranks)
    with hw.open(directory) as source:
        state = dict(source.tensors())
        manifest = source.manifest
        result = Result(name, rank, ranks, tensors=len(manifest), nbytes=sum(spec.nbytes for spec in manifest.values()))
        # Shards are streamed in the order of vLLM's default loader: file by file, as the names lie in them.
        order = list(manifest)

        def own(target: nn.Module) -> None:
            target.load_weights((key, state[key]) for key in order)  # type: ignore[operator]

        theirs, ours = model(), model()
        garble(theirs, 1)
        before = snapshot(theirs)
        own(theirs)
        expected = snapshot(theirs)
        result.unwritten = [
            key
            for key, _ in theirs.named_parameters()
            if before[key].numel() and torch.equal(before[key], expected[key])
        ]
        garble(ours, 1)
        plan = hw.trace(ours, manifest, **allowed)  # type: ignore[arg-type]
        touched = differences(ours, before)
        if touched:
            result.differing["after tracing alone"] = touched
        sliced = [step for step in plan.steps if isinstance(step, Copy) and step.of is not step.into]
        result.copies = sum(isinstance(step, Copy) for step in plan.steps)
        result.slices, result.programs = len(sliced), sum(isinstance(step, Program) for step in plan.steps)
        result.bytes_needed = needed(plan, manifest)
        result.fallback, result.skipped = len(plan.fallback), len(plan.names(hw.Fate.SKIPPED))
        result.notes = [
            f"{note.what} of {len(note.sources)} tensors at {short(note.where)}" for note in plan.graph_breaks
        ]
        result.side_effects, result.state_read = list(plan.side_effects), list(plan.state_read)

        def road(words: str, what: Any, seed: int | None) -> None:
            if seed is not None:
                garble(ours, seed)
            report = hw.load(ours, what, show_progress=False, **allowed)  # type: ignore[arg-type]
            result.bytes_read = result.bytes_read or report.bytes_read
            wrong = differences(ours, expected)
            if wrong:
                result.differing[words] = wrong

        road("files", directory, None)
        result.equal = len(expected) - len(result.differing.get("files", ()))
        road("files again", directory, None)
        road("a mapping", state, None)
        if not result.unwritten:
            road("files, over garble", directory, 2)
            road("a mapping, over garble", state, 3)
        # The times, after everything is warm.
        result.trace, result.own = fastest(
            lambda: hw.trace(ours, manifest, **allowed),  # type: ignore[arg-type]
            lambda: own(theirs),
            repeats=repeats,
        )
    return result


def short(where: str) -> str:
    """Files in packages by their path in the package."""
    return re.sub(r"^.*/site-packages/", "", where)


def work(rank: int, ranks: int, port: int, names: Sequence[str], directory: Path, repeats: int, queue: Any) -> None:
    """One rank: a process that joins its group and examines one architecture after the other."""
    torch.set_num_threads(1)
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(ranks, rank, f"tcp://127.0.0.1:{port}", rank, backend="gloo")
        initialize_model_parallel(ranks)
    for name in names:
        try:
            result = examine(name, directory / name.replace(" ", "-"), rank, ranks, repeats)
        except Exception as error:
            traceback.print_exc()
            result = Result(name, rank, ranks, error=f"{type(error).__name__}: {error}")
        queue.put(result)
    destroy_model_parallel()
    destroy_distributed_environment()


def run(names: Sequence[str], directory: Path, ranks: int, repeats: int) -> list[Result]:
    """Examine in fresh processes, one for each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    group = [
        context.Process(target=work, args=(rank, ranks, port, names, directory, repeats, queue))
        for rank in range(ranks)
    ]
    for process in group:
        process.start()
    results: list[Result] = []
    while len(results) < len(names) * ranks and (any(process.is_alive() for process in group) or not queue.empty()):
        try:
            results.append(queue.get(timeout=1))
        except Exception:
            continue
    for process in group:
        process.join(10)
        process.kill()
    found = {(result.name, result.rank) for result in results}
    results += [
        Result(name, rank, ranks, error="its process died")
        for name in names
        for rank in range(ranks)
        if (name, rank) not in found
    ]
    return sorted(results, key=lambda result: (list(names).index(result.name), result.rank))


def show(results: Iterable[Result], console: Console) -> None:
    table = Table(title="planned loading against vLLM's own load_weights; µs a tensor")
    for head in (
        "architecture", "rank", "tensors", "equal", "differ", "copies", "slices", "programs", "fallback",
        "needed", "read", "trace µs", "own µs", "ratio",
    ):  # fmt: skip
        table.add_column(head, justify="left" if head == "architecture" else "right")
    for result in results:
        if result.error:
            table.add_row(result.name, f"{result.rank} of {result.ranks}", *["-"] * 2, "error")
            continue
        table.add_row(
            result.name,
            f"{result.rank} of {result.ranks}",
            str(result.tensors),
            str(result.equal),
            str(max(map(len, result.differing.values()), default=0)),
            str(result.copies),
            str(result.slices),
            str(result.programs),
            str(result.fallback),
            f"{result.bytes_needed / result.nbytes:.0%}",
            f"{result.bytes_read / result.nbytes:.0%}",
            f"{result.trace / result.tensors * 1e6:.0f}",
            f"{result.own / result.tensors * 1e6:.0f}",
            f"{result.trace / result.own:.2f}",
        )
    console.print(table)
    for result in results:
        who = f"{result.name}, rank {result.rank} of {result.ranks}"
        lines = [result.error] if result.error else []
        lines += [f"fell back: {note}" for note in result.notes]
        lines += [f"vLLM leaves unwritten: {_some(result.unwritten)}"] if result.unwritten else []
        lines += [f"skipped by its loader: {result.skipped} tensors"] if result.skipped else []
        lines += [f"side effects of its loader: {_some(result.side_effects)}"] if result.side_effects else []
        lines += [f"state read: {_some(result.state_read)}"] if result.state_read else []
        lines += [f"differ, from {words}: {_some(wrong)}" for words, wrong in result.differing.items()]
        for line in lines:
            console.print(f"{who}: {line}", markup=False, highlight=False)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ARCHITECTURES), help="architectures, separated by commas")
    parser.add_argument("--two-ranks", default="llama,qwen3-moe", help="architectures for two ranks; may be empty")
    parser.add_argument("--repeats", type=int, default=10, help="of each timing; the fastest is shown")
    parser.add_argument("--dir", type=Path, help="where checkpoints are written; by default a temporary directory")
    parser.add_argument("--json", type=Path, help="also write everything here")
    options = parser.parse_args()
    names = [name for name in options.only.split(",") if name]
    pairs = [name for name in options.two_ranks.split(",") if name]
    console = Console(width=max(140, Console().width))
    with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
        directory = Path(temporary)
        for name in dict.fromkeys([*names, *pairs]):
            make(ARCHITECTURES[name], directory / name.replace(" ", "-"))
        results = run(names, directory, 1, options.repeats) if names else []
        results += run(pairs, directory, 2, options.repeats) if pairs else []
    show(results, console)
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=1))
    sys.exit(any(result.error or result.differing for result in results))


if __name__ == "__main__":
    main()
