"""Unwritten: whether tensors were written while a version was sent, as far as torch counts writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ..text import some


def watching(tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]]) -> Callable[[], list[str]]:
    """What names those of these tensors that were written after this call."""

    def counts() -> dict[str, int]:
        return {name: tensor._version for name, tensor in tensors() if not tensor.is_inference()}

    before = counts()
    return lambda: [name for name, count in counts().items() if count != before[name]]


def of_two_steps(names: Iterable[str]) -> str:
    """What to say of tensors that were written."""
    return (
        f"{some(list(names), 3)}: written while the version was sent, so it would be of two steps; nobody has it. "
        "Train on when result() has returned, or send a copy of the tensors"
    )
