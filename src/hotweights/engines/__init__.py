"""Engines: what a model's framework knows about loading it. One table; each engine speaks only its own seams."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import nn

from ..manifest import Manifest
from ..plan import Patterns, Step

__all__ = ["Rules", "rules_for"]


@dataclass(frozen=True, slots=True)
class Rules:
    """What loading ``manifest`` into a model means to its framework.

    Attributes:
        steps: what goes where; ``None`` for each tensor to its own name.
        skip: tensors that the framework's own loading drops.
        allow_missing: names that it does not expect.
        problems: what it refuses.
        runs_hooks: whether its own loading runs the hooks of ``load_state_dict``. Where it does not, a module that has
            some is no problem: without them is how it loads.
    """

    steps: tuple[Step, ...] | None = None
    skip: Patterns = ()
    allow_missing: Patterns = ()
    problems: tuple[str, ...] = ()
    runs_hooks: bool = True


def rules_for(model: nn.Module, manifest: Manifest) -> Rules:
    """The rules of the model's framework, by the names of its classes: no framework is imported to find out."""
    if "transformers" in sys.modules:
        from . import transformers

        if transformers.owns(model):
            return transformers.rules(model, manifest)
    return Rules()
