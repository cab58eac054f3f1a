"""A trainer refits a vLLM server after each optimiser step, on a CPU: ``make refit-vllm``.

After each step the server must say what a fresh engine says that was started from the trainer's saved checkpoint. If it
does not, this ends with an error.
"""

from __future__ import annotations

import json
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
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1")
os.environ["PYTHONWARNINGS"] = "ignore"  # those of vLLM and torch; nothing here depends on it

PROMPT = list(range(5, 45))
ENGINE = {
    "dtype": "bfloat16",
    "max_model_len": 256,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 64 << 20,
    "enforce_eager": True,
    "skip_tokenizer_init": True,
}


def serve(model: Path, port: int, log: Path) -> subprocess.Popen[bytes]:
    """vLLM's server. The two options of hotweights are all that is added."""
    options = [f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in ENGINE.items()]
    ours = ["--load-format", "hotweights", "--weight-transfer-config", '{"backend": "hotweights"}']
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command, "--host", "127.0.0.1", *options, *ours],
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


def asked(url: str, model: Path) -> list[int]:
    """What the server says to the prompt, greedily."""
    question = {"model": str(model), "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    body = json.dumps({**question, "detokenize": False, "return_token_ids": True}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        tokens: list[int] = json.load(response)["choices"][0]["token_ids"]
    return tokens


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
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    return [*llm.generate([{"prompt_token_ids": PROMPT}], greedy, use_tqdm=False)[0].outputs[0].token_ids]


def main(folder: Path) -> None:
    """Train, refit, compare; all files go to ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig
    from vllm.distributed.weight_transfer.base import ModuleSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from hotweights.engines.vllm import HTTPClient, TrainerInit

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    start = folder / "step-0"
    model.save_pretrained(start)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = folder / "server.log"
    server = serve(start, port, log)
    try:
        prepare_engines()
        wait_until_ready(server, url, log)
        client = HTTPClient(url)
        engine = WeightTransferTrainerFactory.trainer_init(
            TrainerInit(rank=0), client=client, source=ModuleSource(model)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        said = [asked(url, start)]
        print(f"step 0: {said[0]}", flush=True)
        for step in (1, 2, 3):
            batch = torch.randint(0, 1024, (4, 32))
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            report = engine.send_weights(version=f"step-{step}")
            said.append(asked(url, start))
            stall = f"stall {client.stall_seconds * 1000:.0f} ms, of it {report.seconds * 1000:.0f} ms transfer"
            print(f"step {step}: version {report.version!r}, {stall}: {said[step]}", flush=True)
            model.save_pretrained(folder / f"step-{step}")
        engine.shutdown()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    with multiprocessing.get_context("forkserver").Pool(1, maxtasksperchild=1) as pool:
        expected = pool.map(fresh, [str(folder / f"step-{step}") for step in range(4)], chunksize=1)
    wrong = [step for step in range(4) if said[step] != expected[step]]
    if wrong:
        raise SystemExit(f"after the steps {wrong} the server did not say what a fresh engine says: {expected}")
    if len({tuple(tokens) for tokens in said}) < 4:
        raise SystemExit("two versions say the same, so this shows nothing")
    print("after each step the server says what a fresh engine says")


if __name__ == "__main__":
    scratch = Path(tempfile.mkdtemp(prefix="refit-vllm-"))
    try:
        main(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
