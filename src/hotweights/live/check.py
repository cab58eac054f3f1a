"""Check: what the caller of an update says of the new version, before it is committed."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn

from ..arguments import shown
from ..errors import LiveModelError, UsageError
from ..failure import blame, called

Check = Callable[[nn.Module], object]
"""Looks at a model that holds a new version. It raises, or returns ``False``, where that must not be served.

Else it returns ``True`` or ``None``.
"""


def ask(check: Check, model: nn.Module) -> None:
    """Let the check look at the model.

    Raises:
        LiveModelError: it returned false, as the answer of a comparison may be too.
        UsageError: it returned what is no answer: a number, NaN among them, a text, what must be awaited.
        Exception: what it raised.
    """
    name = called(check)
    try:
        answer = check(model)
    except Exception as error:
        blame(error, f"check={name}")
        raise
    if inspect.isawaitable(answer):
        getattr(answer, "close", bool)()
        raise UsageError(f"check={name}: returned what must be awaited; give a function that is not async")
    if answer is None:
        return
    if not _is_truth(answer):
        raise UsageError(
            f"check={name}: returned {shown(answer)}; a check returns True or None where the version may serve, and "
            "False where not, or raises. Of a number return a comparison, and of several values bool(values.all())"
        )
    if not answer:
        raise LiveModelError(f"check={name}: returned {answer!r} for the new version")


def _is_truth(answer: object) -> bool:
    """A bool, or one value of that dtype: a tensor of torch, a value of numpy."""
    if isinstance(answer, bool):
        return True
    if isinstance(answer, torch.Tensor):
        return answer.dtype == torch.bool and answer.numel() == 1
    return type(answer).__module__ == "numpy" and type(answer).__name__ in ("bool", "bool_")
