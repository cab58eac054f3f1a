"""Check: what the caller of an update says of the new version, before it is committed."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from ..errors import LiveModelError

Check = Callable[[nn.Module], object]
"""Looks at a model that holds a new version. It raises, or returns ``False``, where that must not be served."""


def ask(check: Check, model: nn.Module) -> None:
    """Let the check look at the model.

    Raises:
        LiveModelError: it returned what is false, as the answer of a comparison may be, or what must be awaited.
        Exception: what it raised.
    """
    name = getattr(check, "__qualname__", repr(check))
    answer = check(model)
    if inspect.isawaitable(answer):
        getattr(answer, "close", bool)()
        raise LiveModelError(f"check={name}: returned what must be awaited; give a function that is not async")
    if answer is not None and not answer:
        raise LiveModelError(f"check={name}: returned {answer!r} for the new version")
