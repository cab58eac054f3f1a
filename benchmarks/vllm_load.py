"""How long vLLM takes to make a model ready by each load format, from files in the page cache, on the CPU.

    python benchmarks/vllm_load.py                 # 1.2 GB of bfloat16, three rounds
    python benchmarks/vllm_load.py --layers 2 --rounds 1

It needs an environment with vllm on a CPU (``make test-vllm`` makes one). Each measurement is a process of its own,
which has imported everything and has loaded something tiny by the same format before; formats take turns. *ready* is
all of ``get_model``: the model is built, loaded and processed (on a CPU: packed for its kernels). *memory* is the most
that the process held of its own beyond what it held before.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent / "tests" / "vllm"
sys.path.insert(0, str(TESTS))

from drive import Zoo  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

FORMATS = ("auto", "runai_streamer", "hotweights")


def make(directory: Path, layers: int) -> Path:
    """A Llama with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    torch.set_default_dtype(torch.bfloat16)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory, max_shard_size="300MB")
    torch.set_default_dtype(torch.float32)
    return directory


def measure(tiny: str, path: str, load_format: str) -> tuple[float, int]:
    """Seconds until the model is ready, and the most memory beyond what was held before."""
    from test_loading import join, load

    join()
    options: dict[str, Any] = {"load_format": load_format}
    load(tiny, options)
    before, peak, done = _held(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, _held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    load(path, options)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    return seconds, peak - before


def _held() -> int:
    with open("/proc/self/statm") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def show(results: dict[str, list[tuple[float, int]]], console: Console) -> None:
    """The table."""
    table = Table("load format", "ready, s", "of auto", "memory, MB")
    base = statistics.median(seconds for seconds, _ in results["auto"])
    for name, runs in results.items():
        seconds, peak = statistics.median(took for took, _ in runs), max(peak for _, peak in runs)
        table.add_row(name, f"{seconds:.2f}", f"{seconds / base:.2f}", f"{peak / 1e6:.0f}")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="of the model; 90 MB each")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(arguments)
    os.environ.update(Zoo.environment, PYTHONPATH=f"{TESTS}:{Path(__file__).parent}")
    results: dict[str, list[tuple[float, int]]] = {name: [] for name in FORMATS}
    with tempfile.TemporaryDirectory() as directory:
        zoo = Zoo(Path(directory))
        tiny = zoo.checkpoint("llama", "A")
        path = make(Path(directory) / "large", given.layers)
        for _ in range(given.rounds):
            for name in FORMATS:
                results[name].append(zoo.run(measure, None, str(tiny), str(path), name, seconds=300))
    show(results, Console())


if __name__ == "__main__":
    main()
