"""What the tests of verl share: scripts in processes of their own, checkpoints, and what verl expects around it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run(script: str, *, folder: Path, **given: Any) -> Any:
    """What a script of this folder, or another, prints in its last line as JSON. It is given the rest as JSON."""
    (folder / "vllm-0.32.0+cpu.dist-info").mkdir(exist_ok=True)
    # verl looks for the distribution ``vllm``; that of builds for CPUs has another name.
    (folder / "vllm-0.32.0+cpu.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(folder)]),
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu",
        "VERL_REPLICA_RANK": "0",
        "VERL_RAY_JOB_ID": folder.name,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GLOO_SOCKET_IFNAME": "lo",
        "RAY_memory_monitor_refresh_ms": "0",  # It kills actors where other processes fill the memory.
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(HERE / script), json.dumps({**given, "folder": str(folder)})]
    with open(folder / f"{Path(script).stem}.log", "w") as log:  # Their packages say much.
        piped = {"stdout": subprocess.PIPE, "stderr": log, "text": True}
        done = subprocess.run(command, env=environment, timeout=1700, check=False, **piped)
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 0, f"{script} ended with {done.returncode}; see {log.name}; {lines[-5:]}"
    return json.loads(lines[-1])


def checkpoint(folder: str, name: str, seed: int, **config: Any) -> str:
    """A tiny Llama with random weights."""
    import torch
    import transformers

    path = f"{folder}/{name}"
    if not os.path.exists(path):
        sizes = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
        torch.manual_seed(seed)
        llama = transformers.LlamaConfig(**{**sizes, **heads, "initializer_range": 0.2, **config})
        transformers.AutoModelForCausalLM.from_config(llama, dtype=torch.bfloat16).save_pretrained(path)
    return path
