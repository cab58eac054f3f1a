"""NeMo-RL: a checkpoint engine, by ``policy.generation.refit_transport=hotweights.engines.nemo_rl:NemoEngine``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from nemo_rl.utils.checkpoint_engines.base import CheckpointEngine

from ..sources.pairs import Pair
from .refit import Pairs, RefitEnd

_BATCH_NBYTES = 256 << 20


class NemoEngine(CheckpointEngine):  # type: ignore[misc]  # NeMo-RL is not installed where types are checked.
    """Carries weights from NeMo-RL's policy to its generation workers: all of them take a version, or none does."""

    def __init__(self, bucket_size: int, release_after_refit: bool = False, **engine_kwargs: Any) -> None:
        """Nothing is connected yet.

        Args:
            bucket_size: bytes that are loaded at once, at most.
            release_after_refit: NeMo-RL's own: it calls ``finalize`` after each version.
            **engine_kwargs: for ``RefitEnd``.
        """
        self._end = RefitEnd(**engine_kwargs)
        self._batch = min(bucket_size, _BATCH_NBYTES)
        self._count = 0

    def prepare(self) -> dict[str, Any]:
        """What the others must know of this process."""
        return self._end.describe()

    def init_policy_process_group(
        self, *, worker_rank: int, train_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> None:
        """Connect a rank of the policy."""
        self._end.connect(metadata, rank=worker_rank, trainers=train_world_size)

    def init_rollout_process_group(
        self, *, rollout_rank: int, train_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> None:
        """Connect a generation worker."""
        self._end.connect(metadata, rank=train_world_size + rollout_rank, trainers=train_world_size)

    def finalize(self) -> None:
        """Let go of the other end; NeMo-RL connects again before the next version."""
        self._end.close()

    async def send_weights(self, weights: Pairs) -> None:
        """Send a version; on other ranks than the first only gather.

        Raises:
            TransferAborted: no worker has it; each problem begins with a worker's name.
        """
        self._count += 1
        await self._end.send(weights, self._count)

    async def receive_weight_batches(self) -> AsyncIterator[list[Pair]]:
        """The tensors of the version, some at a time; to read to the end is to take it."""
        batch: list[Pair] = []
        async for name, tensor in self._end.receive():
            if batch and sum(other.nbytes for _, other in batch) + tensor.nbytes > self._batch:
                yield batch
                batch = []
            batch.append((name, tensor))
        if batch:
            yield batch
