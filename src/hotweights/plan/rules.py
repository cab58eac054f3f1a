"""Rules: what loading a manifest means to a model's framework."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from .patterns import Patterns
from .steps import Step


@dataclass(frozen=True, slots=True)
class Rules:
    """What loading one manifest into one model means to the model's framework.

    Attributes:
        steps: what goes where, with levels; ``None`` for each tensor to its own name.
        zeroed: names of the model that are filled with zeros, unless the model has loading code of its own.
        constants: tensors that the steps use.
        skip: tensors that the framework's own loading drops.
        allow_missing: names that it does not expect.
        problems: what it refuses.
        load: its loading of real tensors, to prove a plan by; ``None`` where the model has loading code of its own.
    """

    steps: tuple[tuple[int, Step], ...] | None = None
    zeroed: tuple[str, ...] = ()
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    skip: Patterns = ()
    allow_missing: Patterns = ()
    problems: tuple[str, ...] = ()
    load: Callable[[Iterable[tuple[str, torch.Tensor]]], object] | None = None
