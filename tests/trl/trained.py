"""Trainers of TRL as users make them, in processes of their own, and what they train: tiny models with a tokenizer."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import drive
from drive import OPTIONS, PROMPTS

ENGINE = {key: value for key, value in OPTIONS.items() if key != "skip_tokenizer_init"}
"""TRL asks for tokens by words and by numbers, so the engine has a tokenizer."""


class Zoo(drive.Zoo):
    """As for vLLM; each checkpoint has a tokenizer of as many words as there are tokens."""

    def checkpoint(self, name: str, weights: str) -> Path:
        path = super().checkpoint(name, weights)
        if not (path / "tokenizer.json").exists():
            make_tokenizer(path)
        return path


def make_tokenizer(path: Path) -> None:
    """Write it: ``w3``, ``w4`` and so on."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, 1000)}, "w3"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="w3",
        chat_template="{% for message in messages %}{{ message['content'] }} {% endfor %}",
    ).save_pretrained(path)


def even(completion_ids: Any, **_: Any) -> list[float]:
    """The reward: how many tokens are even."""
    return [sum(token % 2 == 0 for token in tokens) / max(len(tokens), 1) for tokens in completion_ids]


def even_words(completions: Any, **_: Any) -> list[float]:
    """The same, of words."""
    return [float(sum(int(word[1:] or 1) % 2 == 0 for word in text.split())) for text in completions]


SETTINGS = {
    "use_cpu": True,
    "use_vllm": True,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "bf16": False,
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": [],
}


def trainer_of(kind: str, model: str, folder: str, adapter: bool = False, **settings: Any) -> Any:
    """A trainer, ready: ``"GRPO"``, ``"RLOO"`` or ``"OnlineDPO"``."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    more: dict[str, Any] = {}
    if adapter:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(r=4, target_modules="all-linear", modules_to_save=None)
    prompts = Dataset.from_dict({"prompt": [f"w{n} w{n + 1} w{n + 2}" for n in range(10, 50)]})
    settings = {**SETTINGS, "output_dir": folder, "model_init_kwargs": {"dtype": "float32"}, **settings}
    if kind == "OnlineDPO":
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        return OnlineDPOTrainer(
            model=model,
            reward_funcs=even_words,
            processing_class=AutoTokenizer.from_pretrained(model),
            train_dataset=prompts,
            args=OnlineDPOConfig(max_new_tokens=16, max_length=64, **settings),
            **more,
        )
    args = getattr(trl, f"{kind}Config")(num_generations=4, max_completion_length=16, **settings)
    return getattr(trl, f"{kind}Trainer")(model=model, reward_funcs=even, train_dataset=prompts, args=args, **more)


def keep_merged(trainer: Any) -> None:
    """Keep what TRL merges, for ``save``: merged anew it is another in its last bits, for unmerging rounds the base."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    merge = model.merge_adapter

    def merging(*given: Any, **named: Any) -> None:
        merge(*given, **named)
        trainer.as_merged = copy.deepcopy(model.base_model).unload()

    model.merge_adapter = merging


def save(trainer: Any, path: str) -> None:
    """What the trainer has given vLLM, as a checkpoint; adapters are in it as they were merged."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "peft_config"):
        assert not any(getattr(module, "merged", False) for module in model.modules()), "TRL has left it merged"
        model = trainer.as_merged
    model.save_pretrained(path)
    make_tokenizer(Path(path))


def by_client(client: Any) -> list[int]:
    """What a server says, asked as TRL asks it."""
    answer = client.generate([PROMPTS[1]], max_tokens=16, temperature=0, generation_kwargs={"ignore_eos": True})
    tokens: list[int] = answer["completion_ids"][0]
    return tokens


def by_engine(llm: Any) -> list[int]:
    """What an engine of this process says."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    prompts: Any = [{"prompt_token_ids": PROMPTS[1]}]
    return [*llm.generate(prompts, greedy, use_tqdm=False)[0].outputs[0].token_ids]


def small_engines() -> None:
    """Engines that TRL starts in this process are as those of all tests: TRL has no options for it."""
    from trl.experimental.online_dpo import online_dpo_trainer
    from trl.generation import vllm_generation

    for module in (vllm_generation, online_dpo_trainer):
        module.LLM = functools.partial(_started, module.LLM)


def _started(start: Any, **options: Any) -> Any:
    options.pop("gpu_memory_utilization")
    return start(**{**options, **ENGINE})


def life(
    kind: str, model: str, folder: str, adapter: bool, settings: dict[str, Any]
) -> list[tuple[Any, list[int], str]]:
    """Of each version that a trainer gives vLLM: its name, what vLLM says then, and where the trainer saved it."""
    import hotweights.engines.trl

    found: list[tuple[Any, list[int], str]] = []

    def synced(sync: Any) -> None:
        holder = getattr(trainer, "vllm_generation", trainer)
        said = by_engine(holder.llm) if settings["vllm_mode"] == "colocate" else by_client(holder.vllm_client)
        found.append((sync.version, said, f"{folder}/version-{sync.version}"))
        save(trainer, found[-1][2])

    if settings["vllm_mode"] == "colocate":
        small_engines()
    hotweights.engines.trl.enable(on_sync=synced, timeout=120)
    trainer = trainer_of(kind, model, folder, adapter, **settings)
    if adapter:
        keep_merged(trainer)
    trainer.train()
    return found


def alone(talker: drive.Talker) -> list[int]:
    """What it says when it is asked nothing else meanwhile: beside other prompts kernels round in another way."""
    return by_engine(talker.llm)


def fresh(zoo: Zoo, path: str) -> list[int]:
    """What a fresh engine of vLLM's own default says."""
    said: list[int] = zoo.run(alone, Path(path), options=ENGINE)
    return said
