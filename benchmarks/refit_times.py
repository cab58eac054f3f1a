"""How long refits of a vLLM engine take beside stock: vLLM's own weight transfer, and TRL's own sync. Three tables.

    python benchmarks/refit_times.py                     # what the environment has of both
    python benchmarks/refit_times.py --only trl --rounds 9

It needs an environment with vllm on a CPU (``make test-vllm`` makes one), and for the others with trl too (``make
test-trl``). All ways hold an engine of their own at once, and take turns in random order; each does two refits before.
A ratio is the median over rounds of one round's times, ours by stock's; the load of the machine stands beside it.

* vLLM: its NCCL engines as they are, by a group of gloo's, since they run on a CPU so (see ``refit_faults.py``).
* TRL: its colocate mode, whose own sync runs on a CPU where vLLM does not pack weights for its kernels
  (``vllm._custom_ops._supports_onednn = False``); ours is shown so, and as vLLM starts by default.
* TRL's server mode: ours alone. Its own ends in ``VLLMClient.init_communicator`` by a ``NotImplementedError`` without
  CUDA.

Other stacks: ``refit_others.py``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "vllm"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "trl"))

from rich.console import Console
from trained import Zoo
from trainers import trained

from refit_faults import Remote, engine, sender_of, source_of
from turns import Way, measured, process, table

MODEL = "llama-200MB"


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


def by_trl_server(url: str, weights: str) -> Way:
    """What TRL's trainers generate with, in server mode, where the server is in processes of its own."""
    import transformers
    from accelerate import Accelerator
    from trl.generation.vllm_generation import VLLMGeneration

    import hotweights.engines.trl

    syncs: list[hotweights.engines.trl.Sync] = []
    hotweights.engines.trl.enable(on_sync=syncs.append)
    model = transformers.AutoModelForCausalLM.from_pretrained(weights)
    generation = VLLMGeneration(model, Accelerator(cpu=True), None, mode="server", server_base_url=url)

    def way() -> tuple[float, float]:
        generation.sync_weights()
        return syncs[-1].stall_seconds, syncs[-1].seconds

    return way


def main() -> None:
    """Print the tables."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", choices=("vllm", "trl", "trl-server"))
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
                        process(by_vllm, b, is_ours, stack.enter_context(engine(zoo, MODEL, is_ours)))
                    )
                    for name, is_ours in (("nccl, by gloo", False), ("hotweights", True))
                }
                found = measured(ways, options.rounds)
            console.print(table("vLLM's weight transfer, 200 MB of bfloat16", found, "nccl, by gloo"))
        if options.only in (None, "trl") and importlib.util.find_spec("trl") is not None:
            with ExitStack() as stack:
                ways = {
                    name: stack.enter_context(process(by_trl, a, b, is_ours, packs))
                    for name, is_ours, packs in (
                        ("TRL, unpacked weights", False, False),
                        ("hotweights, unpacked weights", True, False),
                        ("hotweights, packed weights", True, True),
                    )
                }
                found = measured(ways, options.rounds)
            console.print(table("TRL's sync in colocate mode, 200 MB of bfloat16", found, "TRL, unpacked weights"))
        if options.only in (None, "trl-server") and importlib.util.find_spec("trl") is not None:
            from serving import Server

            server = Server(Path(a), Path(folder, "server.log"))
            try:
                server.wait_until_ready()
                with process(by_trl_server, server.url, b) as turns:
                    found = measured({"hotweights": turns}, options.rounds)
            finally:
                server.close()
            console.print(table("TRL's sync in server mode, 200 MB of bfloat16", found, "hotweights"))


if __name__ == "__main__":
    main()
