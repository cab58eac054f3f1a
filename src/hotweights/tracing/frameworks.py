"""The table of frameworks that have a say in loading. None is imported to find out."""

from __future__ import annotations

import sys

from torch import nn

from ..manifest import Manifest
from ..plan.rules import Rules


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
