"""Unwritten: whether tensors were written while a version was sent, as far as torch counts writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ..errors import UsageError
from ..sources.contracts import InMemory, Source
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


def unwritten_check(source: Source) -> Callable[[], object]:
    """What raises ``UsageError`` if a tensor in memory was written after this call, as far as torch counts writes.

    Digests are of what was read, so they fit also where some tensors are of the next step by then.
    """
    if not isinstance(source, InMemory):
        return bool

    written = watching(lambda: ((name, source.borrow(name)) for name in source.manifest))

    def check() -> None:
        if names := written():
            raise UsageError(of_two_steps(names))

    return check
