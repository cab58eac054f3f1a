"""checkpoint-engine: callbacks by which a live model takes what its parameter server sends, and a worker for vLLM.

Importing this imports neither of them; ``CheckpointEngineWorker`` is for vLLM's ``--worker-extension-cls``.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

import torch.distributed

from ..errors import PeerLost, UpdateAborted
from ..live.model import LiveModel
from ..live.report import UpdateReport
from ..sources.pairs import Pair
from .pushed import PushedUpdate

if TYPE_CHECKING:
    from .vllm.checkpoint_engine import CheckpointEngineWorker

__all__ = ["Callbacks", "CheckpointEngineWorker"]


class Callbacks:
    """One update, as ``run`` and ``post_hook`` of ``checkpoint_engine.worker.update_weights_from_ipc``.

    Use it in a ``with`` around that call. Leaving it raises what has failed, when the parameter server has its answer.
    """

    def __init__(
        self,
        live: LiveModel,
        *,
        version: str | int | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        """Nothing is begun yet.

        Args:
            live: the model that serves.
            version: its name; by default the number of commits.
            group: ranks that take a version together or not at all, a group that works on the host, such as gloo's. By
                default each takes it for itself.
        """
        self._pushed = PushedUpdate(live.begin, agree=None if group is None else partial(_agree, group))
        self._version = version
        self._stack = ExitStack()

    @property
    def report(self) -> UpdateReport | None:
        """What was done, once the version was taken."""
        return self._pushed.report

    def run(self, weights: list[Pair]) -> None:
        """Take one bucket.

        Raises:
            Exception: it cannot be taken. The parameter server gets the words, and ends the round for all workers.
        """
        self._pushed.feed_or_raise(weights)

    def post_hook(self) -> None:
        """Commit, if all of a version came. It raises nothing: the parameter server would wait for ever."""
        self._pushed.finish_quietly(self._version)

    def __enter__(self) -> Callbacks:
        self._stack.enter_context(self._pushed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if error is None and self.report is None:
                self._pushed.fail(PeerLost("the parameter server did not send all"))
            if isinstance(error, Exception):
                self._pushed.fail(error)
            if error is None or isinstance(error, Exception):
                self._pushed.finish(self._version)


def _agree(group: torch.distributed.ProcessGroup, problem: Exception | None) -> None:
    words: list[str | None] = [None] * torch.distributed.get_world_size(group)
    own = None if problem is None else f"{type(problem).__name__}: {problem}"
    torch.distributed.all_gather_object(words, own, group=group)
    if problem is not None:
        raise problem
    problems = [f"rank {rank}: {word}" for rank, word in enumerate(words) if word is not None]
    if problems:
        raise UpdateAborted("another rank cannot take this version, so none does", problems)


def __getattr__(name: str) -> object:
    if name != "CheckpointEngineWorker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .vllm.checkpoint_engine import CheckpointEngineWorker

    return CheckpointEngineWorker
