"""An engine of vLLM with our worker extension, which checkpoint-engine's parameter server updates."""

import json
import multiprocessing
import sys

import torch
from checkpoint_engine import worker
from parameter_server import CPU, serve
from stack import checkpoint

from hotweights.engines.checkpoint_engine import CheckpointEngineWorker

worker.DeviceManager = CPU


class WorkerOnCPU(CheckpointEngineWorker):
    """The same, on a device that checkpoint-engine knows no name for."""

    _device_uuid = "cpu"


def main(folder, start, rounds):
    """What the engine says at its start and after each round: a checkpoint, and what is wrong with it."""
    import transformers
    from vllm import LLM, SamplingParams

    paths = {name: checkpoint(folder, name, seed) for seed, name in enumerate("AB")}
    llm = LLM(
        paths[start],
        load_format="hotweights" if rounds else "auto",
        worker_extension_cls="engine.WorkerOnCPU",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        max_num_batched_tokens=256,
        max_num_seqs=8,
        dtype="bfloat16",
        kv_cache_memory_bytes=64 << 20,
    )

    def says():
        llm.reset_prefix_cache()
        greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
        (out,) = llm.generate([{"prompt_token_ids": [*range(5, 45)]}], greedy, use_tqdm=False)
        return [*out.outputs[0].token_ids]

    found = [(None, says(), None)]
    context = multiprocessing.get_context("fork")
    for name, wrong, dies_at in rounds:
        state = transformers.AutoModelForCausalLM.from_pretrained(paths[name], dtype=torch.bfloat16).state_dict()
        if wrong == "missing":
            state.pop("model.layers.1.mlp.up_proj.weight")
        if wrong == "unknown":
            state = {"a.weight": torch.ones(4), **state}
        ours, theirs = context.Pipe()
        server = context.Process(target=serve, args=(state, theirs, dies_at))
        server.start()
        theirs.close()
        ((_, address),) = ours.recv()
        words = None
        try:
            llm.collective_rpc("update_weights_from_ipc", args=({"cpu": address},))
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
        told = ours.recv()[0] if dies_at is None else None
        if dies_at is None:
            ours.send("goodbye")
        server.join()
        found.append((words, says(), told))
    return found


if __name__ == "__main__":
    sys.modules["engine"] = sys.modules["__main__"]  # vLLM imports the extension by this name.
    print(json.dumps(main(**json.loads(sys.argv[1]))), flush=True)
