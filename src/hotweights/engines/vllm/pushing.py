"""Updates that another package pushes into vLLM's workers within a ``collective_rpc``: verl, checkpoint-engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from vllm.logger import init_logger

from ...live.update import Update
from ..pushed import PushedUpdate
from .attached import as_loaded, stale_draft, updatable
from .ranks import Ranks, words_of
from .tied_head import twin_of_head

_LOG = init_logger("vllm.hotweights")


def take_pushed(worker: Any, receive: Callable[[PushedUpdate], None]) -> None:
    """Take a version, if every rank can. Every rank must call this.

    Args:
        worker: vLLM's.
        receive: feeds what is pushed, until everything came.

    Raises, on the last rank only:
        Exception: no rank has the version. On the others this returns: ``collective_rpc`` reads the ranks' answers up
            to the first failure, and takes those that it left for answers to its next call.
    """
    ranks = Ranks()
    try:
        # Whether a worker can be updated is asked inside, too: whoever pushes waits for it in any case.
        with PushedUpdate(
            partial(begun, worker),
            agree=lambda problem: ranks.agree(None if problem is None else words_of(problem)),
            twins=partial(twin_of_head, worker.model_config),
        ) as pushed:
            try:
                receive(pushed)
            except Exception as error:
                pushed.fail(error)
            report = pushed.finish()
    except Exception as error:
        _LOG.warning("hotweights: rank %d did not take what was pushed: %s", ranks.rank, ranks.own_words(error))
        if ranks.rank == ranks.size - 1:
            raise
        return
    if hasattr(worker.model_runner, "reset_lora_state"):
        worker.model_runner.reset_lora_state()
    _LOG.info("hotweights: version %r is live", report.version)
    for warning in (*report.warnings, *stale_draft(worker.vllm_config)):
        _LOG.warning("hotweights: %s", warning)


@contextmanager
def begun(worker: Any) -> Iterator[Update]:
    """An update of a worker's model, in the state in which it was loaded."""
    live = updatable(worker.get_model(), worker.vllm_config)
    with as_loaded(live.model, worker.vllm_config), live.begin() as update:
        yield update
