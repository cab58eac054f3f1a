"""verl's default path (trainer and rollout on the same devices), as it is and with ``load_format=hotweights``: times.

    python benchmarks/verl_refit.py
    python benchmarks/verl_refit.py --rounds 5 --mb 50

It needs verl's environment on a CPU (``make test-verl`` makes one). verl's real sender pushes weights into verl's real
worker extension in two engines of vLLM, each in a process of its own; which of them is next is drawn by chance. The
weights of a round are new, and both engines must say the same after it. vLLM packs no weights for its kernels here, in
neither engine: verl's own path cannot write into packed ones.

*total* is from the trainer's first tensor until the engine can go on, *stall* how long the engine did not step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "verl"))

FORMATS = {"verl": "auto", "hotweights": "hotweights"}
HANDLE = "ipc:///tmp/rl-colocate-zmq-{job}-replica-0-rank-0.sock"
BUCKET_MB = 64


def serve(contender: str, path: str) -> None:
    """An engine that takes a version and says something, for each line of its input."""
    import verl.workers.rollout.vllm_rollout.bucketed_weight_transfer  # noqa: F401
    import vllm._custom_ops
    from vllm import LLM, SamplingParams

    vllm._custom_ops._supports_onednn = False
    llm = LLM(
        path,
        load_format=FORMATS[contender],
        worker_extension_cls="verl.workers.rollout.vllm_rollout.utils.vLLMColocateWorkerExtension",
        dtype="bfloat16",
        kv_cache_memory_bytes=64 << 20,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        max_num_batched_tokens=128,
        max_num_seqs=8,
    )
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    answers = os.fdopen(int(os.environ["ANSWERS"]), "w", buffering=1)
    print(json.dumps("ready"), file=answers)
    for _ in sys.stdin:
        began = time.perf_counter()
        llm.collective_rpc("update_weights_from_ipc", kwargs={"use_shm": True})
        stall = time.perf_counter() - began
        llm.reset_prefix_cache()
        (out,) = llm.generate([{"prompt_token_ids": [*range(5, 45)]}], greedy, use_tqdm=False)
        print(json.dumps([stall, [*out.outputs[0].token_ids]]), file=answers)


class Engine:
    """A contender's engine, in a process of its own."""

    def __init__(self, contender: str, path: str, folder: str) -> None:
        self.handle = HANDLE.format(job=f"{os.getpid()}-{contender}")
        ours, theirs = os.pipe()
        environment = {**_environment(folder), "VERL_RAY_JOB_ID": f"{os.getpid()}-{contender}", "ANSWERS": str(theirs)}
        with open(f"{folder}/{contender}.log", "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--serve", contender, path],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=[theirs],
                text=True,
                bufsize=1,
            )
        os.close(theirs)
        self._answers = os.fdopen(ours)
        self._log = f"{folder}/{contender}.log"

    def answer(self) -> Any:
        """What it says next."""
        line = self._answers.readline()
        if not line:
            sys.exit(f"the engine has ended:\n{Path(self._log).read_text()[-3000:]}")
        return json.loads(line)

    def refit(self, state: dict[str, Any]) -> tuple[float, float, list[int]]:
        """Total and stall, in seconds, and what it says then."""
        from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

        assert self._process.stdin is not None
        began = time.perf_counter()
        self._process.stdin.write("refit\n")
        sender = BucketedWeightSender(self.handle, bucket_size_mb=BUCKET_MB, use_shm=True)
        asyncio.run(sender.async_send_weights(iter(state.items())))
        sent = time.perf_counter() - began
        stall, said = self.answer()
        return max(sent, stall), stall, said

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._answers.close()


def _environment(folder: str) -> dict[str, str]:
    """verl without an accelerator, beside a vLLM whose distribution has another name on a CPU."""
    info = Path(folder, "vllm-0.32.0+cpu.dist-info")
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent / "tests" / "verl"), folder]),
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu",
        "VERL_REPLICA_RANK": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _rounds(engines: dict[str, Engine], state: dict[str, Any], rounds: int) -> Iterator[tuple[str, float, float]]:
    for number in range(rounds):
        for tensor in state.values():
            tensor.mul_(1 + 1 / (number + 8))
        order = [*engines]
        random.shuffle(order)
        said = {}
        for contender in order:
            total, stall, said[contender] = engines[contender].refit(state)
            yield contender, total, stall
        if said["verl"] != said["hotweights"]:
            sys.exit(f"the engines say different things of the same weights: {said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="refits of each; the first, with the plan, is told apart")
    parser.add_argument("--mb", type=int, default=200, help="size of the model in bfloat16, roughly")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(*given.serve)
        return
    with tempfile.TemporaryDirectory() as folder:
        if os.environ.get("VERL_PLATFORM") != "cpu":  # verl reads its environment while it is imported.
            environment = _environment(folder)
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode)
        import torch
        from stack import checkpoint
        from transformers import AutoModelForCausalLM

        layers = max(1, round((given.mb - 32) / 22))
        sizes = {"vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": layers}
        heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "initializer_range": 0.02}
        path = checkpoint(folder, "start", 0, **sizes, **heads)
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
            state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
            nbytes = sum(tensor.nbytes for tensor in state.values())
            engines = {contender: Engine(contender, path, folder) for contender in FORMATS}
            try:
                for engine in engines.values():
                    engine.answer()
                times: dict[str, list[tuple[float, float]]] = {contender: [] for contender in engines}
                for contender, total, stall in _rounds(engines, state, given.rounds):
                    times[contender].append((total, stall))
            finally:
                for engine in engines.values():
                    engine.close()
    print(f"{nbytes / 1e6:.0f} MB, {given.rounds} refits of each; ms")
    print(f"{'':12}{'first total':>14}{'first stall':>14}{'median total':>14}{'median stall':>14}{'largest stall':>15}")
    for contender, ((first, stood), *later) in times.items():
        totals, stalls = zip(*later, strict=True)
        row = first, stood, statistics.median(totals), statistics.median(stalls), max(stalls)
        print(f"{contender:12}" + "".join(f"{1000 * each:>14.0f}" for each in row))


if __name__ == "__main__":
    main()
