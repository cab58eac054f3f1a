"""Hooks: what is called after a commit. All of them are called, whatever fails."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from .. import signals
from ..arguments import check_takes_one, shown
from ..errors import CommitHookError, UsageError


class Hooks:
    """Functions of a version, called in the order in which they were added."""

    def __init__(self) -> None:
        self._hooks: list[Callable[[str | int], object]] = []

    def add(self, hook: Callable[[str | int], object]) -> None:
        """Call it too, from now on."""
        if not callable(hook):
            raise UsageError(f"on_commit takes a function, which is called with the version; found {shown(hook)}")
        check_takes_one("a hook of on_commit:", hook, "the version")
        self._hooks.append(hook)

    @signals.held
    def call(self, version: str | int, failures: list[BaseException]) -> None:
        """Call all hooks. Failures are added to ``failures``: what is to be raised comes first.

        The owner of the list clears it, for tracebacks keep frames alive.
        """
        problems = []
        for hook in self._hooks:
            try:
                answer = hook(version)
                if inspect.iscoroutine(answer):  # A task of a loop runs by itself.
                    answer.close()
                    raise UsageError(
                        "it returned a coroutine, which nobody would await; give a function that is not async"
                    )
            except BaseException as error:
                problems.append(f"{getattr(hook, '__qualname__', hook)}: {error!r}")
                failures.append(error)
        if problems:
            _tell(failures, CommitHookError(f"version {version!r} is live, and hooks failed", problems))


def _tell(failures: list[BaseException], told: CommitHookError) -> None:
    """Put the error that lists the hooks first, but behind interruptions (Ctrl-C), which nobody may swallow."""
    told.__cause__ = failures[0]
    failures.sort(key=lambda error: isinstance(error, Exception))
    failures.insert(sum(not isinstance(error, Exception) for error in failures), told)
