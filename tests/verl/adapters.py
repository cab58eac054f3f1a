"""An engine of vLLM with verl's worker extension, to which verl's sender pushes a base and adapters."""

import asyncio
import json
import multiprocessing
import os
import sys

from stack import checkpoint

CONFIG = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"], "bias": "none"}
HANDLE = "ipc:///tmp/rl-colocate-zmq-{job}-replica-0-rank-0.sock"


def adapted(base: str, seed: int, rank: int):
    """The base under an adapter with random weights."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = peft.get_peft_model(model, peft.LoraConfig(**{**CONFIG, "r": rank}))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def push(base: str, seed: int, what: str, job: str) -> None:
    """verl's sender; ``what`` is the base, or an adapter with which something may be wrong."""
    import peft
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    model = adapted(base, seed, 32 if what == "large" else 8)

    def weights():
        if what == "base":
            for name, tensor in model.base_model.model.state_dict().items():
                if "lora_" not in name:
                    yield name, tensor
            return
        for number, (name, tensor) in enumerate(peft.get_peft_model_state_dict(model).items()):
            if what == "killed" and number == 4:
                os.kill(os.getpid(), 9)
            if what == "shape" and number == 5:
                tensor = tensor[:, :-1]  # Of a ``down_proj`` or so: vLLM fills up with zeros.
            if what != "half" or number != 3:
                yield name, tensor

    sender = BucketedWeightSender(HANDLE.format(job=job), bucket_size_mb=1, use_shm=True)
    asyncio.run(sender.async_send_weights(weights()))


def main(folder: str, start: str, rounds: list[tuple[str, int, str]]) -> list:
    """Each round is a base, the seed of an adapter, and what is pushed.

    Returns:
        Of each what it raised, what the engine says after it, and how the sender ended. Of no rounds what a fresh
        engine says with each base and the adapter of each seed, read from a directory.
    """
    import verl.workers.rollout.vllm_rollout.bucketed_weight_transfer  # noqa: F401

    context = multiprocessing.get_context("fork")
    paths = {name: checkpoint(folder, name, seed) for seed, name in enumerate("AB")}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        paths[start],
        load_format="hotweights" if rounds else "auto",
        worker_extension_cls="verl.workers.rollout.vllm_rollout.utils.vLLMColocateWorkerExtension" if rounds else "",
        enable_lora=True,
        max_loras=1,
        max_lora_rank=16,
        max_num_seqs=8,
        dtype="bfloat16",
        kv_cache_memory_bytes=64 << 20,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        max_num_batched_tokens=256,
    )

    def says(adapter):
        llm.reset_prefix_cache()
        greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": [*range(5, 45)]}]
        (out,) = llm.generate(prompts, greedy, use_tqdm=False, lora_request=adapter)
        return [*out.outputs[0].token_ids]

    if not rounds:
        fresh = []
        for seed in (1, 2):
            path = f"{folder}/adapter-{seed}"
            adapted(paths[start], seed, 8).save_pretrained(path)
            fresh.append(says(LoRARequest(f"fresh-{seed}", seed, path)))
        return [says(None), *fresh]
    theirs = LoRARequest("123", 123, "simon_lora_path")  # As verl's server asks for it, if the engine has it.
    found = []
    for name, seed, what in rounds:
        sender = context.Process(target=push, args=(paths[name], seed, what, os.environ["VERL_RAY_JOB_ID"]))
        sender.start()
        config = {**CONFIG, "r": 32 if what == "large" else 8}
        words = None
        try:
            given = {"peft_config": config, "base_sync_done": what != "base", "use_shm": True}
            llm.collective_rpc("update_weights_from_ipc", kwargs=given)
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
        sender.join(60)
        code = sender.exitcode
        sender.kill()
        has = 123 in llm.llm_engine.list_loras()
        found.append((what, words, says(theirs if has else None), code))
    return found


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))), flush=True)
    os._exit(0)
