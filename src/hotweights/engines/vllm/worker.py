"""Worker: what ``--worker-extension-cls`` adds to vLLM's workers, for ``collective_rpc``.

A failure is returned, never raised: an exception in one worker would leave the engine to guess about the others.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Concatenate, ParamSpec

from ...errors import UsageError
from ...live.model import LiveModel
from ...live.report import UpdateReport
from .attached import as_loaded, attached, loaded_by_us, sleeps, stale_draft, updatable
from .projection import LEFT_ALONE, project, projection_in, projections
from .ranks import Ranks, together, words_of
from .receiving import is_address, receiver_of

_LOG = logging.getLogger("vllm.hotweights")
Given = ParamSpec("Given")
Answering = Callable[Concatenate["Worker", Given], dict[str, Any]]


def _answering(act: Answering[Given]) -> Answering[Given]:
    """Let a method answer with what it raises, also where it is called with other arguments than it has."""

    @functools.wraps(act)
    def answer(worker: Worker, /, *args: Given.args, **kwargs: Given.kwargs) -> dict[str, Any]:
        try:
            return act(worker, *args, **kwargs)
        except Exception as error:
            _LOG.warning("hotweights: a call failed", exc_info=True)
            return {**_state(worker, Ranks()), **_session(worker), **_NOTHING, "error": words_of(error)}

    return answer


_NOTHING = {"digest": None, "hidden": None, "report": None}
"""What an answer says where there is nothing to say."""


class Worker:
    """Adds to vLLM's worker class; ``self`` is a worker of vLLM."""

    finish_weight_update: Any
    get_model: Any
    model_config: Any
    model_runner: Any
    parallel_config: Any
    vllm_config: Any

    @_answering
    def hotweights_update(
        self,
        source: str,
        version: str | int | None = None,
        timeout: float = 60.0,
        keys: str | None = None,
        insecure: bool = False,
    ) -> dict[str, Any]:
        """Take new weights, if every rank can. Call it on all workers, while no step runs.

        Whoever calls it resets the engine's caches afterwards: ``hotweights.engines.vllm.update`` does both.

        Args:
            source: path of a checkpoint, or address of a ``hotweights.Sender``, which has as many receivers as there
                are ranks.
            version: its name; by default the one that the sender gave, or the number of commits.
            timeout: seconds that each single wait for a sender may take.
            keys: the directory of the job's keys, for ``tcps:``, unless the engine's options say where it has them.
            insecure: go without keys in a network.

        Returns:
            ``rank``, and the ``version`` and ``state`` that it has now. ``error`` is ``None`` if every rank has taken
            the new version, and ``report`` has the numbers; else it says what failed, here or on another rank, and
            every rank has what it had before.
        """
        ranks = Ranks()
        try:
            report = _updated(self, ranks, source, version, timeout=float(timeout), keys=keys, insecure=insecure)
        except Exception as error:
            _LOG.warning("hotweights: rank %d did not take %s: %s", ranks.rank, source, error)
            return {**_state(self, ranks), "error": ranks.own_words(error), "report": None}
        if hasattr(self.model_runner, "reset_lora_state"):
            self.model_runner.reset_lora_state()
        _LOG.info("hotweights: version %r is live, by %s", report.version, source)
        return {**_state(self, ranks), "error": None, "report": _numbers(report, stale_draft(self.vllm_config))}

    @_answering
    def hotweights_status(self, digest: bool = True) -> dict[str, Any]:
        """What this worker holds.

        Args:
            digest: whether to read every byte of the model, to tell it from another.

        Returns:
            ``rank``, ``version`` and ``state``; ``digest``, over all parameters and buffers as they are now, but
            ``None`` while the engine sleeps; ``hidden``, how many weights kernels have packed into memory of their own,
            which no digest sees; ``error``. Of vLLM's weight transfer: ``session_open``, and ``refused``, why the
            last version was not taken.
        """
        ranks = Ranks()
        try:
            live = loaded_by_us(self.get_model())
        except UsageError as error:
            return {**_state(self, ranks), **_session(self), "digest": None, "hidden": None, "error": str(error)}
        whole = live.digest().whole if digest and not sleeps() else None
        return {**_state(self, ranks), **_session(self), "digest": whole, "hidden": _hidden(live), "error": None}

    @_answering
    def hotweights_close_session(self) -> dict[str, Any]:
        """End the update of vLLM's weight transfer that a trainer has left open when it died; else do nothing.

        A ``Trainer`` of ours does so by itself when it connects.

        Returns:
            As ``hotweights_status``, without a digest.
        """
        if getattr(self, "_weight_update_active", False):
            self.finish_weight_update()
        return self.hotweights_status(digest=False)


def _session(worker: Worker) -> dict[str, Any]:
    """What vLLM's weight transfer is at, where it is configured."""
    backend = getattr(worker, "weight_transfer_engine", None)
    return {
        "session_open": getattr(worker, "_weight_update_active", False),
        "refused": getattr(backend, "refused", None),
    }


def _updated(worker: Worker, ranks: Ranks, source: str, version: str | int | None, **how: Any) -> UpdateReport:
    with ExitStack() as stack:
        problem = None
        try:
            live = updatable(worker.get_model(), worker.vllm_config)
            opened = stack.enter_context(_opened(worker, source, ranks, **how))
            beside = projection_in(source, live.model, worker.model_config)
        except Exception as error:
            problem = words_of(error)
        ranks.agree(problem)
        stack.enter_context(as_loaded(live.model, worker.vllm_config))
        report = live.update(opened, version=version, show_progress=False)
        if beside is not None:
            project(live.model, beside)
        elif projections(live.model):
            report = replace(report, warnings=(*report.warnings, LEFT_ALONE))
        return report


def _opened(worker: Worker, source: str, ranks: Ranks, **how: Any) -> Any:
    """The source, opened. Ranks that read files decide among each other; with a sender, the sender sees to that."""
    if not isinstance(source, str) or not source:
        raise UsageError(f"a source is a path, or the address of a sender; found {source!r}")
    if is_address(source):
        return receiver_of(worker.vllm_config, source, name=f"rank {ranks.rank}", **how)
    from .loader import checkpoint

    return together(checkpoint(source), ranks)


def _state(worker: Worker, ranks: Ranks) -> dict[str, Any]:
    live = attached(worker.get_model())
    version, state = (None, None) if live is None else (live.version, live.state.value)
    return {"rank": ranks.rank, "ranks": ranks.size, "version": version, "state": state}


def _hidden(live: LiveModel) -> int:
    """How many parameters are empty, because what they held is in memory that only a kernel sees."""
    return sum(parameter.numel() == 0 for parameter in live.model.parameters())


def _numbers(report: UpdateReport, warnings: list[str]) -> dict[str, Any]:
    """What fits an answer: every rank's goes through the engine's pipe, so of tensors' names only the counts do."""
    names = ("previous", "bytes_read", "bytes_written", "seconds", "stall_seconds", "copy_bytes", "planned")
    return {
        **{name: getattr(report, name) for name in names},
        "tensors": {fate.value: len(names) for fate, names in report.tensors.items()},
        "fell_back": list(report.fell_back),
        "replaced": len(report.replaced),
        "warnings": [*report.warnings, *warnings],
    }
