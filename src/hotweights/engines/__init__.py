"""Engines: what a model's framework knows about loading it. One table; each engine speaks only its own seams."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..manifest import Manifest
from ..plan import Patterns, Step

__all__ = ["Rules", "has_rules", "rules_for"]


@dataclass(frozen=True, slots=True)
class Rules:
    """What loading ``manifest`` into a model means to its framework.

    Attributes:
        steps: what goes where, with levels; ``None`` for each tensor to its own name.
        constants: tensors that the steps use.
        skip: tensors that the framework's own loading drops.
        allow_missing: names that it does not expect.
        problems: what it refuses.
        load: its loading of real tensors, to prove a plan by; ``None`` where the model has loading code of its own.
    """

    steps: tuple[tuple[int, Step], ...] | None = None
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    skip: Patterns = ()
    allow_missing: Patterns = ()
    problems: tuple[str, ...] = ()
    load: Callable[[Iterable[tuple[str, torch.Tensor]]], object] | None = None


def has_rules(model: nn.Module) -> bool:
    """Whether the model's framework has a say in its loading. No framework is imported to find out."""
    if "transformers" in sys.modules:
        from . import transformers

        return transformers.owns(model)
    return False


def rules_for(model: nn.Module, manifest: Manifest) -> Rules:
    """The rules of the model's framework, by the names of its classes."""
    if has_rules(model):
        from . import transformers

        return transformers.rules(model, manifest)
    return Rules()
