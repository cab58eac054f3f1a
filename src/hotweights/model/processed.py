"""Processed layers: those that a live model has put into kernel format. Who plans for them as they are is told so."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakSet

from torch import nn

from ..errors import PlanError
from ..text import some
from .walk import modules_of

_PROCESSED: WeakSet[nn.Module] = WeakSet()  # An attribute of theirs would be exchanged with their formats.


def note(layers: Iterable[nn.Module]) -> None:
    """These are in kernel format from now on."""
    _PROCESSED.update(layers)


def forget(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """These are in checkpoint format from now on. Returns those that were not."""
    before = processed_among(layers)
    _PROCESSED.difference_update(before)
    return before


def processed_among(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of the layers that are in kernel format now."""
    return [layer for layer in layers if layer in _PROCESSED]


def processed(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's layers that are in kernel format now."""
    if not _PROCESSED:
        return ()
    return tuple(name[:-1] or type(model).__name__ for name, module in modules_of(model) if module in _PROCESSED)


def in_words(layers: tuple[str, ...]) -> str:
    """What is to be known of these layers, and what to use instead of planning for them."""
    return (
        f"{some(layers, 3)}: processed by a LiveModel, so these tensors are those of kernels, not of a checkpoint; "
        "live.plan is the plan by which it was loaded, live.explain(name) tells of one tensor, and live.update loads"
    )


def telling(error: PlanError, layers: tuple[str, ...]) -> PlanError:
    """The error, and that the misfit may come of processing."""
    return PlanError(error.title, error.problems, advice="\n".join(filter(None, (error.advice, in_words(layers)))))
