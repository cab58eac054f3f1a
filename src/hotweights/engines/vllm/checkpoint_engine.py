"""CheckpointEngineWorker: checkpoint-engine's worker extension for vLLM, all or nothing."""

from __future__ import annotations

from checkpoint_engine import worker as theirs
from checkpoint_engine.worker import VllmColocateWorkerExtension

from ..pushed import PushedUpdate
from ..watched import watched_context
from .pushing import take_pushed
from .worker import Worker


class CheckpointEngineWorker(Worker, VllmColocateWorkerExtension):  # type: ignore[misc]
    """Adds to vLLM's worker class what checkpoint-engine calls there; ``self`` is a worker of vLLM."""

    def update_weights_from_ipc(self, zmq_handles: dict[str, str]) -> None:
        """Take the version that the parameter server sends, if every rank can. It is answered in any case.

        Args:
            zmq_handles: addresses by the devices' names.

        Raises, on the last rank:
            Exception: no rank has the version; the message says why.
        """

        def receive(pushed: PushedUpdate) -> None:
            theirs.update_weights_from_ipc(
                watched_context(),
                zmq_handles[self._device_uuid],
                self.device.index,
                run=pushed.feed_or_raise,
                post_hook=pushed.finish_quietly,
            )

        take_pushed(self, receive)
