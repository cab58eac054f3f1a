"""How long refits of a vLLM engine take beside stock: vLLM's own weight transfer, and TRL's own sync. Two tables.

    python benchmarks/refit_times.py                     # what the environment has of both
    python benchmarks/refit_times.py --only trl --rounds 9

It needs an environment with vllm on a CPU (``make test-vllm`` makes one), and for the second table with trl too (``make
test-trl``). All ways hold an engine of their own at once, and take turns in random order; each does two refits before.
A ratio is the median over rounds of one round's times, ours by stock's; the load of the machine stands beside it.

* vLLM: its NCCL engines as they are, by a group of gloo's, since they run on a CPU so (see ``refit_faults.py``).
* TRL: its colocate mode, whose own sync runs on a CPU where vLLM does not pack weights for its kernels
  (``vllm._custom_ops._supports_onednn = False``); ours is shown so, and as vLLM starts by default. TRL's server mode
  has no stock without CUDA.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "vllm"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "trl"))

from rich.console import Console
from rich.table import Table
from trained import Zoo
from trainers import trained

from refit_faults import Remote, engine, sender_of, source_of

MODEL = "llama-200MB"
WARM = 2
"""Refits of each way before those that count: the first makes the plan."""
SECONDS = 900.0
"""Within which any single step must end."""

Way = Callable[[], tuple[float, float]]
"""Does one refit in its process; returns how long the engine stood, and how long all took."""


def taking_turns(make: Callable[..., Way], given: tuple[Any, ...], turns: Any) -> None:
    """A process that does one refit whenever it is told."""
    way = make(*given)
    turns.send("ready")
    while True:
        try:
            turns.recv()
        except EOFError:
            return
        turns.send(way())


def by_vllm(path: str, is_ours: bool, pipe: Any) -> Way:
    """A trainer of vLLM's factory, whose engine is in another process."""
    client = Remote(pipe)
    sender = sender_of(client, source_of(trained(path), "nothing"), is_ours, timeout=120)

    def way() -> tuple[float, float]:
        began = time.monotonic()
        sender.send_weights()
        return client.stalls[-1], time.monotonic() - began

    return way


def by_trl(start: str, weights: str, is_ours: bool, packs: bool) -> Way:
    """What TRL's trainers generate with, in colocate mode. They generate and train in turns: the stall is all of it."""
    import transformers
    from accelerate import Accelerator
    from trained import small_engines
    from trl.generation.vllm_generation import VLLMGeneration
    from vllm import _custom_ops

    if not packs:
        _custom_ops._supports_onednn = False
    small_engines()
    if is_ours:
        import hotweights.engines.trl

        hotweights.engines.trl.enable()
    model = transformers.AutoModelForCausalLM.from_pretrained(weights)
    model.name_or_path = start
    generation = VLLMGeneration(model, Accelerator(cpu=True), None, mode="colocate")

    def way() -> tuple[float, float]:
        began = time.monotonic()
        generation.sync_weights()
        seconds = time.monotonic() - began
        return seconds, seconds

    return way


@contextmanager
def process(zoo: Zoo, make: Callable[..., Way], *given: Any) -> Iterator[Any]:
    """The end of a pipe by which a process is told to refit."""
    ours, theirs = multiprocessing.Pipe()
    work = threading.Thread(target=zoo.run, args=(taking_turns, None, make, given, theirs), kwargs={"seconds": 1e5})
    work.start()
    try:
        assert answer_of(ours) == "ready"
        theirs.close()
        yield ours
    finally:
        ours.close()
        work.join(60)


def answer_of(turns: Any) -> Any:
    """What a process says next."""
    if not turns.poll(SECONDS):
        raise TimeoutError(f"no answer in {SECONDS:g} s")
    return turns.recv()


def measured(ways: Mapping[str, Any], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """The times of each way, round by round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(-WARM, rounds):
        for name, turns in random.sample([*ways.items()], len(ways)):
            turns.send("go")
            times = answer_of(turns)
            if number >= 0:
                found[name].append(times)
    return found


def table(title: str, found: Mapping[str, list[tuple[float, float]]], stock: str) -> Table:
    """Medians, and ratios to ``stock``."""
    load = os.getloadavg()[0]
    shown = Table("", "stall, ms", "total, ms", "stall, ratio", "total, ratio", title=f"{title}; load {load:.1f}")
    for name, rounds in found.items():
        medians = [f"{statistics.median(each) * 1000:.0f}" for each in zip(*rounds, strict=True)]
        ratios = [
            statistics.median(here[which] / there[which] for here, there in zip(rounds, found[stock], strict=True))
            for which in (0, 1)
        ]
        shown.add_row(name, *medians, *(f"{ratio:.2f}" for ratio in ratios))
    return shown


def main() -> None:
    """Print the tables."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", choices=("vllm", "trl"))
    arguments.add_argument("--rounds", type=int, default=7)
    options = arguments.parse_args()
    os.environ.update(Zoo.environment, PYTHONWARNINGS="ignore")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo(Path(folder))
        a, b = (str(zoo.checkpoint(MODEL, weights)) for weights in "AB")
        if options.only in (None, "vllm"):
            with ExitStack() as stack:
                ways = {
                    name: stack.enter_context(
                        process(zoo, by_vllm, b, is_ours, stack.enter_context(engine(zoo, MODEL, is_ours)))
                    )
                    for name, is_ours in (("nccl, by gloo", False), ("hotweights", True))
                }
                found = measured(ways, options.rounds)
            console.print(table("vLLM's weight transfer, 200 MB of bfloat16", found, "nccl, by gloo"))
        if options.only in (None, "trl") and importlib.util.find_spec("trl") is not None:
            with ExitStack() as stack:
                ways = {
                    name: stack.enter_context(process(zoo, by_trl, a, b, is_ours, packs))
                    for name, is_ours, packs in (
                        ("TRL, unpacked weights", False, False),
                        ("hotweights, unpacked weights", True, False),
                        ("hotweights, packed weights", True, True),
                    )
                }
                found = measured(ways, options.rounds)
            console.print(table("TRL's sync in colocate mode, 200 MB of bfloat16", found, "TRL, unpacked weights"))


if __name__ == "__main__":
    main()
