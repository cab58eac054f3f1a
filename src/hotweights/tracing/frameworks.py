"""The frameworks that have rules of their own for loading a model. So far it is transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn

from ..manifest import Manifest
from ..plan.rules import Rules


def has_rules(model: nn.Module) -> bool:
    """Whether the model's framework has rules for its loading. No framework is imported to find out."""
    if "transformers" in sys.modules:
        from . import transformers

        return transformers.owns(model)
    return False


def rules_for(model: nn.Module, manifest: Manifest) -> Rules:
    """The rules of the model's framework for this manifest; empty ones for a model of no framework."""
    if has_rules(model):
        from . import transformers

        return transformers.rules(model, manifest)
    return Rules()


def initialise_by_rules(model: nn.Module, names: Iterable[str]) -> None:
    """Initialise the tensors with these names as the model's framework does; they are real."""
    if has_rules(model):
        from . import transformers

        transformers.initialise(model, names)
