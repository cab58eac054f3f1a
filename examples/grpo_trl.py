"""TRL's GRPOTrainer and a vLLM server, on a CPU: ``make grpo-trl``. Of hotweights there is one line: ``enable``.

After each sync the server must say what a fresh engine says that was started from the trainer's saved model. If it does
not, this ends with an error.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1")
os.environ["PYTHONWARNINGS"] = "ignore"  # those of TRL, vLLM and torch; nothing here depends on them
warnings.simplefilter("ignore")

PROMPT = list(range(5, 45))
STEPS = 3
ENGINE = {
    "dtype": "bfloat16",
    "max_model_len": 256,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 64 << 20,
    "enforce_eager": True,
}


def make_model(path: Path) -> None:
    """A Llama of random weights, and a tokenizer of 1024 words."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, 1024)}, "w3"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="w3"
    ).save_pretrained(path)


def serve(model: Path, port: int, log: Path) -> subprocess.Popen[bytes]:
    """vLLM's server as TRL asks for it. Of hotweights are the load format and the name of the backend."""
    options = [f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in ENGINE.items()]
    theirs = ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    ours = ["--load-format", "hotweights", "--weight-transfer-config", '{"backend": "hotweights"}']
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command, "--host", "127.0.0.1", *options, *theirs, *ours],
            env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path, seconds: float = 600) -> None:
    """Return when it answers; end this program if it does not."""
    deadline = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')[-5000:]}")


def prepare_engines() -> None:
    """Import vLLM in a process of which others are forked, while this one waits for the server."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker"]
    )
    multiprocessing.forkserver.ensure_running()


def fresh(checkpoint: str) -> list[int]:
    """What a fresh engine says, loaded by vLLM's own default. Runs in a process of its own."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    llm = LLM(checkpoint, use_tqdm_on_load=False, **ENGINE)  # type: ignore[arg-type]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    return [*llm.generate([{"prompt_token_ids": PROMPT}], greedy, use_tqdm=False)[0].outputs[0].token_ids]


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The reward: how many tokens are even."""
    return [sum(token % 2 == 0 for token in tokens) / max(len(tokens), 1) for tokens in completion_ids]


def main(folder: Path) -> None:
    """Train, sync, compare; all files go to ``folder``."""
    model, log = folder / "model", folder / "server.log"
    make_model(model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = serve(model, port, log)
    said: list[list[int]] = []
    saved: list[str] = []
    try:
        prepare_engines()
        from datasets import Dataset
        from transformers.utils import logging
        from trl import GRPOConfig, GRPOTrainer

        import hotweights.engines.trl

        logging.disable_progress_bar()

        def synced(sync: hotweights.engines.trl.Sync) -> None:
            answer = generation.vllm_client.generate(
                [PROMPT], max_tokens=12, temperature=0, generation_kwargs={"ignore_eos": True}
            )
            said.append(answer["completion_ids"][0])
            saved.append(str(folder / f"version-{sync.version}"))
            trainer.save_model(saved[-1])
            times = f"sync {sync.seconds * 1000:.0f} ms, of it stall {sync.stall_seconds * 1000:.0f} ms"
            print(f"step {trainer.state.global_step}: version {sync.version}, {times}: {said[-1]}", flush=True)

        wait_until_ready(server, url, log)
        hotweights.engines.trl.enable(on_sync=synced)
        trainer = GRPOTrainer(
            model=str(model),
            reward_funcs=even,
            train_dataset=Dataset.from_dict({"prompt": [f"w{n} w{n + 1} w{n + 2}" for n in range(10, 50)]}),
            args=GRPOConfig(
                output_dir=str(folder / "out"),
                use_cpu=True,
                use_vllm=True,
                vllm_mode="server",
                vllm_server_base_url=url,
                max_steps=STEPS,
                per_device_train_batch_size=4,
                num_generations=4,
                max_completion_length=16,
                learning_rate=1e-2,
                bf16=False,
                disable_tqdm=True,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
            ),
        )
        generation = trainer.vllm_generation
        trainer.train()
        generation.sync_weights()  # TRL syncs before it generates, so not after the last step.
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    with multiprocessing.get_context("forkserver").Pool(1, maxtasksperchild=1) as pool:
        expected = pool.map(fresh, saved, chunksize=1)
    wrong = [step for step in range(STEPS + 1) if said[step] != expected[step]]
    if wrong:
        raise SystemExit(f"after the steps {wrong} the server did not say what a fresh engine says: {expected}")
    if len({tuple(tokens) for tokens in said}) < STEPS + 1:
        raise SystemExit("two versions say the same, so this shows nothing")
    print("after each step the server says what a fresh engine says")


if __name__ == "__main__":
    scratch = Path(tempfile.mkdtemp(prefix="grpo-trl-"))
    try:
        main(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
