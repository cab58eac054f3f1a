"""Colocated: a vLLM engine in the trainer's own process. It takes a version if those of all processes do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from ...errors import UsageError
from ...live.update import Update
from ...manifest import Manifest, TensorSpec
from ...sources.pairs import Pair
from ..vllm.attached import as_loaded, attached, updatable
from ..vllm.engine import OfflineEngine, done, emptied
from ..vllm.layers import wrapped_by_lora
from ..vllm.ranks import Ranks, Refused, words_of
from .sync import Sync, SyncOptions

Feed = Callable[[Iterable[tuple[str, Tensor]]], object]


class Colocated:
    """A ``vllm.LLM`` whose model hotweights has loaded."""

    def __init__(self, llm: Any, options: SyncOptions) -> None:
        self._engine = OfflineEngine(llm)
        self._options = options
        self._config = llm.llm_engine.vllm_config
        self._runner = llm.llm_engine.model_executor.driver_worker.model_runner
        self._model = self._runner.get_model()
        if attached(self._model) is None:
            raise UsageError(
                "vLLM was not started by hotweights; call hotweights.engines.trl.enable() before the trainer is made"
            )
        self._manifest: Manifest | None = None
        self._count = 0

    @contextmanager
    def update(self, walk: Callable[[], Iterable[Pair]]) -> Iterator[None]:
        """Inside, TRL hands tensors to ``load_weights`` of vLLM's model one by one; they become one version at the end.

        All processes of the trainer must do so.

        Args:
            walk: what will come, to know names, dtypes and shapes. It is called before the first version only.

        Raises:
            UpdateAborted: this process cannot take the version. No process has it.
            Refused: another cannot.
            CommitHookError: the version is live, and a cache could not be emptied.
            Exception: TRL's own code failed inside. No process has the version.
        """
        if self._manifest is None:
            self._manifest = Manifest(TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in walk())
        began = time.monotonic()
        taken = _Taken(self._model, self._config, self._manifest)
        try:
            try:
                with self.handing(taken.feed):
                    yield
            except Exception as error:  # The other processes ask this one whether it takes the version.
                taken.fail(error)
            stall = taken.commit(self._count + 1)
        finally:
            taken.abort()
        self._count += 1
        done(emptied(self._engine.caches("wait"), self._count))
        self._engine.set_version(str(self._count))
        nbytes = self._manifest.nbytes
        self._options.tell(Sync(self._count, nbytes, time.monotonic() - began, stall))

    @property
    def load_weights(self) -> Feed:
        """What TRL calls with a tensor."""
        feed: Feed = self._runner.model.load_weights
        return feed

    @contextmanager
    def handing(self, feed: Feed) -> Iterator[None]:
        """Inside, what TRL hands to ``load_weights`` goes to ``feed``."""
        before = self._runner.model
        self._runner.model = SimpleNamespace(load_weights=feed)  # The model's own is what an update asks for the plan.
        try:
            yield
        finally:
            self._runner.model = before


class _Taken:
    """One version as it comes. What fails is kept until the end: until then other processes gather with this one."""

    def __init__(self, model: Any, config: Any, manifest: Manifest) -> None:
        self._model, self._config, self._manifest = model, config, manifest
        self._update: Update | None = None
        self._failure: Exception | None = None
        self._began = time.monotonic()
        self._wrappers = wrapped_by_lora(model)

    def feed(self, pairs: Iterable[tuple[str, Tensor]]) -> None:
        """Stands for ``load_weights``."""
        if self._failure is not None:
            return
        try:
            with self._as_loaded():
                if self._update is None:  # Not before: TRL wakes a sleeping engine first.
                    self._update = updatable(self._model, self._config).begin(self._manifest)
                self._update.feed(pairs)
        except Exception as error:
            self._failure = error

    def fail(self, error: Exception) -> None:
        """Say that it cannot be taken."""
        self._failure = self._failure or error

    def commit(self, version: int) -> float:
        """Take it, if all processes can. Returns how long that took since the first tensor, in seconds."""
        try:
            self._prepare()
        except Exception as error:
            self.fail(error)
        try:
            Ranks().agree(None if self._failure is None else words_of(self._failure))
        except Refused as refused:
            if self._failure is None:
                raise
            raise self._failure from refused
        assert self._update is not None
        with self._as_loaded():
            self._update.commit(version)
        return time.monotonic() - self._began

    def _prepare(self) -> None:
        if self._failure is not None:
            return
        if self._update is None:
            raise UsageError("the trainer handed over no tensor")
        with self._as_loaded():
            self._update.prepare()

    def _as_loaded(self) -> AbstractContextManager[None]:
        return as_loaded(self._model, self._config, self._wrappers)

    def abort(self) -> None:
        """Nothing after a commit. May be called twice."""
        if self._update is not None:
            self._update.abort()
