"""An asynchronous trainer of TRL that syncs with a server of vLLM. It trains nothing here: its kernels need CUDA."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any


def trainer_of(model: str, folder: str, url: str, **settings: Any) -> Any:
    """A trainer, connected; who makes rollouts is left out, and so is what asks for the name of a GPU."""
    from datasets import Dataset
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer

    async_grpo_trainer.TREE_ATTENTION = "sdpa"
    async_grpo_trainer.get_peak_flops_per_device = lambda *_: None
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"w{n} w{n + 1}"}] for n in range(10, 50)]})
    idle = SimpleNamespace(rollout_buffer=queue.Queue(), check_health=None, update_model_version=lambda version: None)
    args = AsyncGRPOConfig(
        output_dir=folder,
        use_cpu=True,
        max_steps=3,
        bf16=False,
        dtype="float32",
        vllm_server_base_url=url,
        report_to=[],
    )
    trainer = AsyncGRPOTrainer(
        model=model, reward_funcs=[], train_dataset=prompts, args=args, rollout_worker=idle, **settings
    )
    trainer.weight_transfer.init_weight_transfer()
    return trainer


def freeze(model: Any, told: dict[str, list[Any]]) -> None:
    """Train the embedding no longer: TRL leaves it out then, as it does a vision tower."""
    model.get_input_embeddings().weight.requires_grad_(False)
    place = told["names"].index("model.embed_tokens.weight")
    for facts in told.values():
        del facts[place]


def cut(pairs: Iterator[Any]) -> Iterator[Any]:
    """Some of them."""
    yield from itertools.islice(pairs, 3)
    raise OSError("the gather failed")


def life(weights: str, folder: str, url: str, adapter: bool) -> list[Any]:
    """Sync what the trainer begins with, and after a change; in between one that fails. Returns how the last ended."""
    import torch
    from trained import keep_merged, save

    import hotweights.engines.trl

    versions: list[Any] = []
    hotweights.engines.trl.enable(on_sync=lambda sync: versions.append(sync.version), timeout=120)
    more: dict[str, Any] = {}
    if adapter:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(r=4, target_modules="all-linear")
    trainer = trainer_of(weights, folder, url, **more)
    inner = trainer.accelerator.unwrap_model(trainer.model)
    if adapter:
        keep_merged(trainer)
    else:
        freeze(inner, trainer.weight_transfer._weight_update_info)
    trainer._sync_weight()
    theirs = trainer._streaming_iter
    with torch.no_grad():
        for parameter in inner.parameters():
            parameter.mul_(1.25)

    def failing() -> Any:
        stream = theirs()
        stream._pairs = cut(stream._pairs)
        return stream

    trainer._streaming_iter = failing
    try:
        trainer._sync_weight()
        words = None
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
    versions.append(words)
    del trainer._streaming_iter
    trainer._sync_weight()
    save(trainer, f"{folder}/end")
    trainer.weight_transfer.destroy()
    return versions
