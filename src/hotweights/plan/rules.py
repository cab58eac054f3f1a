"""Rules: what loading a manifest means to a model's framework."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .patterns import Patterns
from .steps import Step


class Misfit(NamedTuple):
    """What a conversion makes of several tensors, where the model's tensor has another shape.

    Attributes:
        sources: the tensors that it is made of.
        found: the shape that it would have.
        shapes: both shapes, in words.
        problems: what is said where it may not stay as it is.
    """

    sources: tuple[str, ...]
    found: tuple[int, ...]
    shapes: str
    problems: tuple[str, ...]


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
        mismatched: by the model's name, what its conversions would make in another shape.
        load: its loading of real tensors, to prove a plan by; ``None`` where the model has loading code of its own.
    """

    steps: tuple[tuple[int, Step], ...] | None = None
    zeroed: tuple[str, ...] = ()
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    skip: Patterns = ()
    allow_missing: Patterns = ()
    problems: tuple[str, ...] = ()
    mismatched: Mapping[str, Misfit] = field(default_factory=dict)
    load: Callable[[Iterable[tuple[str, torch.Tensor]]], object] | None = None
