"""WeightSession: one update of one runner's model, from SGLang's begin to its end. Nothing raises: it would end SGLang.

What goes wrong is kept, and said in the answer to each later call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ...errors import CommitHookError, UsageError
from ...live.model import LiveModel
from ...live.update import Update
from ..vllm.ranks import Ranks, words_of
from .loader import as_loaded

Pairs = Iterable[tuple[str, torch.Tensor]]


class WeightSession:
    """An update that is fed by calls.

    Attributes:
        problem: why the version cannot be taken; ``None`` so far, or if it was.
        weight_version: the name that its calls gave.
        flush_cache: whether one of its calls asked for that.
    """

    def __init__(self, live: LiveModel, dtype: torch.dtype) -> None:
        self._live, self._dtype = live, dtype
        self._update: Update | None = None
        self._prepared = False
        self.problem: str | None = None
        self.weight_version: str | None = None
        self.flush_cache = False
        self._try(self._begin)

    def feed(self, pairs: Callable[[], Pairs]) -> str | None:
        """Take tensors. Returns why that failed, if it did."""

        def act() -> None:
            assert self._update is not None, "without one there is a problem"
            if self._prepared:
                raise UsageError("this update has ended; begin another")
            self._update.feed(pairs())

        self._try(act)
        return self.problem

    def prepare(self) -> str | None:
        """See that everything came. Returns why the version cannot be taken."""
        self._try(lambda: self._update.prepare())  # type: ignore[union-attr]
        self._prepared = True
        return self.problem

    def end(self, problem: str | None) -> str | None:
        """Make the version live, or leave the one before, if there is a problem anywhere. Returns what failed.

        After ``prepare`` nothing can fail but hooks of the live model, and those come after the commit.
        """
        update, self._update = self._update, None
        if update is None or problem is not None or self.problem is not None:
            if update is not None:
                update.abort()
            self.problem = self.problem or problem
            return self.problem
        try:
            with as_loaded(self._dtype):
                update.commit(self.weight_version)
        except CommitHookError as error:
            return f"the new version is live; {words_of(error)}"
        except Exception as error:
            self.problem = words_of(error)
        return self.problem

    def _begin(self) -> None:
        self._update = self._live.begin()

    def _try(self, act: Callable[[], object]) -> None:
        """Do it unless something failed before; what fails is kept, and the update ended."""
        if self.problem is not None:
            return
        try:
            with as_loaded(self._dtype):
                act()
        except Exception as error:
            self.problem = words_of(error)
            update, self._update = self._update, None
            if update is not None:
                update.abort()


def agreed(ranks: Ranks, problem: str | None) -> str | None:
    """The problems of all ranks, each with its rank; ``None`` if there is none. All ranks call this."""
    words = ranks.gather(problem)
    found = [f"rank {number}: {word}" for number, word in enumerate(words) if word is not None]
    return "; ".join(found) or None


def ended(sessions: list[WeightSession], ranks: Ranks) -> str | None:
    """End the sessions of all runners of one engine, on all ranks: all models have the new version, or none has."""
    problems = [problem for session in sessions if (problem := session.prepare()) is not None]
    problem = agreed(ranks, problems[0] if problems else None)
    failures = [failure for session in sessions if (failure := session.end(problem)) is not None]
    return failures[0] if problem is None and failures else problem


def updated_from(live: LiveModel, path: str, dtype: torch.dtype, ranks: Ranks) -> str | None:
    """Update from a checkpoint on all ranks, or on none. Returns why that failed, if it did."""
    from ...sources.opening import open as open_source
    from ..vllm.ranks import together

    with ExitStack() as stack:
        problem = None
        try:
            source: Any = stack.enter_context(open_source(path))
        except Exception as error:
            problem = words_of(error)
        if (problem := agreed(ranks, problem)) is not None:
            return problem
        try:
            stack.enter_context(as_loaded(dtype))
            live.update(together(source, ranks), show_progress=False)
        except Exception as error:
            return ranks.own_words(error)
    return None


_SESSIONS = "_hotweights_session"


def session_of(model: nn.Module) -> WeightSession | None:
    """The one that is open."""
    session: WeightSession | None = model.__dict__.get(_SESSIONS)
    return session


def open_session(model: nn.Module, session: WeightSession | None) -> None:
    """Note which one is open; ``None``: none."""
    if session is None:
        model.__dict__.pop(_SESSIONS, None)
    else:
        model.__dict__[_SESSIONS] = session


def parallel_ranks() -> Ranks:
    """The ranks of this engine's tensor parallelism."""
    from sglang.srt.runtime_context import get_parallel

    group: Any = get_parallel().tp_group.cpu_group
    return Ranks.of(group)
