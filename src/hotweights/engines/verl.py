"""verl: the checkpoint engine ``hotweights``. Importing this registers it; verl does so by itself, as a plug-in.

What it does to an engine's server is in ``verl_server.py``.
Other processes than verl's need no more than ``rollout.load_format=hotweights``: see ``verl_colocated.py``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry
from verl.workers.rollout import base

from ..errors import UsageError
from ..sources.pairs import Pair
from .refit import Directions, Pairs, RefitEnd, pairs_of

Arguments = dict[str, list[Any]]
Tensors = AsyncIterator[Pair]

_VLLM = ("vllm", "async")
if base._ROLLOUT_REGISTRY.get(_VLLM) == "verl.workers.rollout.vllm_rollout.ServerAdapter":
    # By name: importing it imports vLLM's part of verl, which a trainer does without.
    base._ROLLOUT_REGISTRY[_VLLM] = "hotweights.engines.verl_server.ServerAdapter"


@CheckpointEngineRegistry.register("hotweights")
class HotweightsCheckpointEngine(CheckpointEngine):  # type: ignore[misc]  # No verl where types are checked.
    """Carries weights from verl's trainer to its rollouts: all of them take a version, or none does.

    verl makes one in each process, by ``checkpoint_engine.backend=hotweights``, and calls its methods in this order.
    """

    wire_format = "named_tensors"

    def __init__(self, bucket_size: int, is_master: bool = False, **engine_kwargs: Any) -> None:
        """Nothing is connected yet.

        Args:
            bucket_size: unused: bytes go through a few small slots of shared memory.
            is_master: unused: the trainer's first rank sends.
            **engine_kwargs: ``checkpoint_engine.engine_kwargs.hotweights``, for ``RefitEnd``.
        """
        self._end = RefitEnd(**engine_kwargs)
        self._count = 0
        if engine_kwargs.get("direct"):
            self.wire_format = "hotweights"

    def prepare(self) -> dict[str, Any]:
        """What the others must know of this process."""
        return self._end.describe()

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[Arguments, Arguments]:
        """The arguments of ``init_process_group``, for each rank of the trainer and of the rollouts."""
        ranks = [*range(actor_wg_world_size + rollout_world_size)]
        both = ranks[:actor_wg_world_size], ranks[actor_wg_world_size:]
        actors, rollouts = (
            {"rank": part, "trainers": [actor_wg_world_size] * len(part), "ends": [metadata] * len(part)}
            for part in both
        )
        return actors, rollouts

    def init_process_group(self, rank: int, trainers: int, ends: list[dict[str, Any]]) -> None:
        """Connect."""
        self._end.connect(ends, rank=rank, trainers=trainers)

    def finalize(self) -> None:
        """Nothing: both ends stay connected for the next version, and verl leaves this out where one has failed."""

    async def send_weights(self, weights: Pairs, global_steps: int | None = None) -> dict[str, float]:
        """Send a version, named by ``global_steps``; on other ranks than the first only gather.

        Returns:
            Metrics, for verl's log.

        Raises:
            TransferAborted: no rollout has it; each problem begins with a rollout's name.
            UsageError: the model has an adapter that is not merged.
        """
        self._count += 1
        report = await self._end.send(_whole(weights), self._count if global_steps is None else global_steps)
        if report is None:
            return {}
        return {"hotweights/seconds": report.seconds, "hotweights/bytes": float(report.nbytes)}

    def receive_weights(self, global_steps: int | None = None) -> Tensors | Directions:
        """The tensors of the version; to read to the end is to take it. With ``direct``, where workers find it."""
        return self._end.receive() if self.wire_format == "named_tensors" else self._end.directions()


async def _whole(weights: Pairs) -> Tensors:
    """The weights.

    Raises, on each rank:
        UsageError: they are the base of an adapter, which verl does not send to rollouts apart: these would go on
            without it.
    """
    async for name, tensor in pairs_of(weights):
        if ".base_layer." in name:
            raise UsageError(
                f"{name} is of a model under an adapter, and verl sends rollouts apart no adapter: they would generate "
                "without it. Add actor_rollout_ref.model.lora.merge=True"
            )
        yield name, tensor
