"""verl's real manager, Ray worker groups and checkpoint-engine workers, with the checkpoint engine ``hotweights``."""

import json
import os
import signal
import sys
import time

import ray
import torch
from stack import checkpoint
from verl.checkpoint_engine import CheckpointEngineManager, CheckpointEngineRegistry, CheckpointEngineWorker
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.workers.config import CheckpointEngineConfig, RolloutConfig
from verl.workers.rollout import BaseRollout


class Trainer(Worker):
    """A rank of the trainer; both gather together, as FSDP does."""

    def __init__(self, path, options):
        super().__init__()
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        self.checkpoint_engine = CheckpointEngineRegistry.new(
            "hotweights", bucket_size=1 << 20, is_master=self.rank == 0, **options
        )
        self.fails_at = self.dies_at = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def step(self, fails_at=None, dies_at=None):
        """Train; ``update_weights`` fails or dies at a tensor."""
        self.fails_at, self.dies_at = fails_at, dies_at
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1.5)

    def _weights(self):
        for number, (name, tensor) in enumerate(self.model.state_dict().items()):
            if number == self.fails_at:
                raise OSError("the trainer's disk is full")
            if number == self.dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield name, tensor

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def update_weights(self, global_steps=None, mode="auto"):
        return await self.checkpoint_engine.send_weights(self._weights(), global_steps=global_steps)

    @register(dispatch_mode=Dispatch.DP_COMPUTE, blocking=False)
    def execute_checkpoint_engine(self, method, *given, **named):
        return getattr(self.checkpoint_engine, method)(*given, **named)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def sums(self):
        return {name: tensor.double().sum().item() for name, tensor in self.model.state_dict().items()}


class Adapter(BaseRollout):
    """In place of an engine: it keeps what it was given."""

    def __init__(self, config, model_config):
        self.got, self.steps, self.fails = {}, None, False

    async def resume(self, tags): ...

    async def release(self): ...

    async def update_weights(self, weights, global_steps=None, wire_format="named_tensors", **_):
        got = {}
        async for name, tensor in weights:
            got[name] = tensor.double().sum().item()
            if self.fails and len(got) == 3:
                raise ValueError("the rollout could not load this")
        self.got, self.steps = got, global_steps


class Rollout(CheckpointEngineWorker):
    """verl's worker beside an engine."""

    def __init__(self, rollout_config, model_config):
        super().__init__(rollout_config, model_config, Adapter(rollout_config, model_config))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def sums(self):
        return [self.server_adapter.steps, self.server_adapter.got]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def fail(self, rank):
        self.server_adapter.fails = rank == self.rank


class Replica:
    """As the manager sees one."""

    def __init__(self, workers):
        self.workers = workers

    async def _nothing(self, *_, **__): ...

    abort_all_requests = release_kv_cache = resume_kv_cache = resume_generation = sleep = wake_up = _nothing


def group(cls, count, **given):
    pool = RayResourcePool(process_on_nodes=[count], use_gpu=False, max_colocate_count=1)
    with_init = RayClassWithInitArgs(cls=ray.remote(cls), **given)
    return RayWorkerGroup(resource_pool=pool, ray_cls_with_init=with_init, device_name="cpu")


def start_ray(**resources):
    wanted = ("VERL_PLATFORM", "VERL_USE_EXTERNAL_MODULES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTHONPATH")
    environment = {name: os.environ[name] for name in wanted}
    os.environ["RAY_DEDUP_LOGS"] = "0"
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=200 << 20,
        runtime_env={"env_vars": environment},
        log_to_driver=False,
        **resources,
    )


def main(folder):
    path = checkpoint(folder, "A", 0)
    start_ray()
    config = CheckpointEngineConfig(
        backend="hotweights", update_weights_bucket_megabytes=1, engine_kwargs={"hotweights": {"timeout": 60}}
    )
    rollout_config = RolloutConfig(name="vllm", checkpoint_engine=config)
    rollouts = group(Rollout, 2, rollout_config=rollout_config, model_config=None)
    trainers = group(Trainer, 2, path=path, options={"timeout": 60})
    manager = CheckpointEngineManager(config=config, actor_wg=trainers, replicas=[Replica(rollouts.workers)])
    found = []

    def update(step, **how):
        trainers.step(**how)
        began = time.monotonic()
        try:
            metrics, words = manager.update_weights(global_steps=step), None
        except Exception as error:
            metrics, words = None, str(error)
        seconds = time.monotonic() - began
        want = None if "dies_at" in how else trainers.sums()[0]
        held = [[steps, got == want] for steps, got in rollouts.sums()]
        found.append({"held": held, "metrics": metrics, "words": words, "seconds": seconds})

    for step in (1, 2, 3):
        update(step)
    rollouts.fail(1)
    update(4)
    rollouts.fail(-1)
    update(5)
    update(6, fails_at=4)
    update(7)
    update(8, dies_at=4)
    trainers = manager.actor_wg = group(Trainer, 2, path=path, options={"timeout": 60})
    update(9)
    ray.shutdown()
    return found


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))), flush=True)
