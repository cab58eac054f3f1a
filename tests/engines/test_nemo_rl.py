"""NeMo-RL's checkpoint engine, called in the order in which NeMo-RL calls it.

The package on PyPI is empty, so its base class is written down here; the engine takes nothing else from it.
"""

import abc
import asyncio
import importlib
import sys
import types

import pytest
import torch

import hotweights as hw


class CheckpointEngine(abc.ABC):
    """What NeMo-RL's base class asks for."""

    shard_expert_weights = False

    @abc.abstractmethod
    def prepare(self): ...

    @abc.abstractmethod
    def init_policy_process_group(self, *, worker_rank, train_world_size, rollout_world_size, metadata): ...

    @abc.abstractmethod
    def init_rollout_process_group(self, *, rollout_rank, train_world_size, rollout_world_size, metadata): ...

    @abc.abstractmethod
    async def send_weights(self, weights): ...

    @abc.abstractmethod
    def receive_weight_batches(self): ...


@pytest.fixture
def engine_class(monkeypatch):
    name = "nemo_rl.utils.checkpoint_engines.base"
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:count]), types.ModuleType(parts[count - 1]))
    sys.modules[name].CheckpointEngine = CheckpointEngine
    monkeypatch.delitem(sys.modules, "hotweights.engines.nemo_rl", raising=False)
    yield importlib.import_module("hotweights.engines.nemo_rl").NemoEngine
    sys.modules.pop("hotweights.engines.nemo_rl")


def connect(policies, rollouts):
    said = [{**engine.prepare(), "rank": rank} for part in (policies, rollouts) for rank, engine in enumerate(part)]
    both = {"train_world_size": len(policies), "rollout_world_size": len(rollouts), "metadata": said}
    for rank, engine in enumerate(policies):
        engine.init_policy_process_group(worker_rank=rank, **both)
    for rank, engine in enumerate(rollouts):
        engine.init_rollout_process_group(rollout_rank=rank, **both)


def weights(value):
    for number in range(6):
        yield f"{number}.weight", torch.full((16, 16), float(value))


async def taken(engine, stop=False):
    batches = []
    async for batch in engine.receive_weight_batches():
        batches.append([*batch])
        if stop:
            raise ValueError("cannot load this")
    return batches


def refit(policies, rollouts, value, stop=False):
    async def run():
        sending = [engine.send_weights(weights(value)) for engine in policies]
        taking = [taken(engine, stop and engine is rollouts[-1]) for engine in rollouts]
        return await asyncio.gather(*sending, *taking, return_exceptions=True)

    return asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("release", [True, False])
def test_workers_take_what_the_policy_sends(engine_class, release):
    how = {"bucket_size": 2048, "release_after_refit": release, "timeout": 20}
    policies, rollouts = ([engine_class(**how) for _ in range(2)] for _ in range(2))
    connect(policies, rollouts)
    for value in (1, 2, 3):
        assert value != 2 or isinstance(refit(policies, rollouts, 9, stop=True)[0], hw.TransferAborted)
        first, second, *both = refit(policies, rollouts, value)
        assert (first, second) == (None, None)
        for batches in both:
            assert [len(batch) for batch in batches] == [2, 2, 2]
            assert [name for batch in batches for name, _ in batch] == [name for name, _ in weights(0)]
            assert all(tensor.eq(value).all() for batch in batches for _, tensor in batch)
        if release:
            for engine in (*policies, *rollouts):
                engine.finalize()
            connect(policies, rollouts)
    for engine in (*policies, *rollouts):
        engine.finalize()


def test_only_the_first_version_is_kept_whole_on_the_host(engine_class, monkeypatch):
    policy, rollout = (engine_class(bucket_size=2048, timeout=20) for _ in range(2))
    kept, keep = [], policy._end._kept
    monkeypatch.setattr(policy._end, "_kept", lambda *given: kept.append(given) or keep(*given))
    for value in (1, 2, 3):
        connect([policy], [rollout])
        assert refit([policy], [rollout], value)[0] is None
        policy.finalize()  # NeMo-RL does so after each.
        rollout.finalize()
    assert len(kept) == 1
