"""Unused: tensors that a model's loading code was given, and did nothing with."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..text import some
from .adapters import of_adapter
from .plan import LoadPlan
from .steps import Fate

_USED = (Fate.WRITTEN, Fate.CAST, Fate.TIED)


def not_used(names: Sequence[str], by: str) -> str:
    """What is said of such tensors."""
    count = f"{len(names)} tensors of the source were" if len(names) > 1 else "1 tensor of the source was"
    return f"{count} not used by {by}: {some(sorted(names), 3)}"


def unused(plan: LoadPlan, by: str) -> tuple[str, ...]:
    """A warning of those tensors that nobody would expect to be left out, or none: they may be misspelled.

    Not of those that a rank leaves to others: it uses tensors whose names differ from theirs in numbers only.
    """
    used = {_numberless(name) for name, fate in plan.fates.items() if fate in _USED}
    odd = [name for name in plan.names(Fate.SKIPPED) if _numberless(name) not in used]
    if not odd:
        return ()
    adapters = "; they are of a PEFT adapter: merge it before saving or sending" if any(map(of_adapter, odd)) else ""
    return (not_used(list(map(plan.manifest.called, odd)), by) + adapters,)


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)
