"""An engine of vLLM with verl's worker extension, to which verl's sender pushes weights from other processes."""

import asyncio
import json
import multiprocessing
import os
import sys

from stack import checkpoint


def push(path: str, handle: str, what: str, at: int) -> None:
    """verl's sender, as its trainer calls it; ``what`` goes wrong ``at`` a tensor."""
    import torch
    import transformers
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    def weights():
        state = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict()
        for number, (name, tensor) in enumerate(state.items()):
            if number == at and what == "killed":
                os.kill(os.getpid(), 9)
            if number == at and what == "raises":
                raise OSError("the trainer fails")
            if number == at and what == "unknown":
                yield "zz", torch.ones(3)
            if what == "untied" and name == "lm_head.weight":
                yield name, torch.zeros_like(tensor)
            elif number != at or what != "missing":
                yield (name.replace("q_proj.", "q_proj.base_layer.") if what == "adapted" else name), tensor

    asyncio.run(BucketedWeightSender(handle, bucket_size_mb=1, use_shm=True).async_send_weights(weights()))


def main(folder: str, start: str, ranks: int, tied: bool, rounds: list[tuple[str, str, int]]) -> list:
    """Each round is a checkpoint, what goes wrong on the last rank, and where.

    Returns:
        Of the start and of each round what went wrong, what it raised, what the engine says after it, and how the
        senders ended. Without rounds it is an engine without us.
    """
    import verl.workers.rollout.vllm_rollout.bucketed_weight_transfer  # noqa: F401

    context = multiprocessing.get_context("fork")  # What they import takes longer than what they do.
    if ranks > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    paths = {
        name: checkpoint(folder, f"{name}{tied}", seed, tie_word_embeddings=tied) for seed, name in enumerate("AB")
    }
    start = start if start in paths else f"{folder}/{start}"
    paths.setdefault(start, start)
    from vllm import LLM, SamplingParams

    extension = "verl.workers.rollout.vllm_rollout.utils.vLLMColocateWorkerExtension"
    fixed = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 256, "max_num_batched_tokens": 256}
    llm = LLM(
        paths[start],
        load_format="hotweights" if rounds else "auto",
        worker_extension_cls=extension,
        tensor_parallel_size=ranks,
        max_num_seqs=8,
        dtype="bfloat16",
        kv_cache_memory_bytes=64 << 20,
        **fixed,
    )
    llm.collective_rpc("monkey_patch_model", kwargs={"vocab_size": 1024})  # verl's server does.

    def says():
        llm.reset_prefix_cache()
        greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
        (out,) = llm.generate([{"prompt_token_ids": [*range(5, 45)]}], greedy, use_tqdm=False)
        return [*out.outputs[0].token_ids]

    found = [(start, None, says(), [])]
    for name, what, at in rounds:
        base = f"ipc:///tmp/rl-colocate-zmq-{os.environ['VERL_RAY_JOB_ID']}-replica-0-rank"
        senders = [
            context.Process(target=push, args=(paths[name], f"{base}-{rank}.sock", *((what, at) if last else ("", -1))))
            for rank in range(ranks)
            for last in [rank == ranks - 1]
        ]
        for sender in senders:
            sender.start()
        words = None
        try:
            llm.collective_rpc("update_weights_from_ipc", kwargs={"use_shm": True})
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
        for sender in senders:
            sender.join(60)
        codes = [sender.exitcode for sender in senders]
        for sender in senders:
            sender.kill()
        found.append((what, words, says(), codes))
    return found


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # Two ranks of vLLM take long to end.
