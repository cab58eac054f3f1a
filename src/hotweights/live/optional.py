"""OptionalTensors: what one version brings and the next does not. Absent ones are as before the first load."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from torch import nn

from ..model.survey import survey
from ..names import bare_names
from ..plan.patterns import Patterns, matches
from ..plan.plan import LoadPlan
from ..plan.steps import Fate
from ..text import size
from .groups import Coverage
from .layout import MemoryLayout

_KEPT_NBYTES = 64 * 1024 * 1024  # or a sixteenth of the model, if that is more


class _Candidate(NamedTuple):
    nbytes: int
    owner: str
    names: list[str]


class OptionalTensors:
    """Tensors whose values from before the first load are kept, so that versions may come with and without them.

    They are those that ``allow_missing=`` or ``allow_mismatched=`` matches, those that the first load lacked or had in
    another shape, and persistent buffers: code may compute these, and a framework may let them be missing. The smallest
    are kept first, and never more than 64 MiB or a sixteenth of the model: ``allow_missing="*"`` would keep a second
    model.

    Attributes:
        names: all their names.
        brought: owners of those that hold what some version brought.
    """

    def __init__(
        self,
        model: nn.Module,
        first: LoadPlan,
        allowed: Patterns,
        layout: MemoryLayout,
        unknown: Collection[str],
    ) -> None:
        """Look at a model before its first load; ``unknown`` are names of tensors that hold no values yet."""
        self._first, self._unknown = first, unknown
        self._match = matches(allowed)
        found = {candidate.owner: candidate for candidate in _candidates(model, first, self._may_lack, layout)}
        self._bound = max(_KEPT_NBYTES, sum(layout.nbytes) // 16)
        self._names: dict[str, list[str]] = {}
        self._adapters = {name for name, (bare, filed) in bare_names(model).items() if bare != filed}
        left = self._bound
        for nbytes, owner, names in sorted(found.values()):
            left -= nbytes
            if left >= 0 and not any(name in unknown for name in names):
                self._names[owner] = names
        self.names = frozenset(name for names in self._names.values() for name in names)
        self.brought: set[str] = set()

    def may_differ(self, name: str, plan: LoadPlan) -> bool:
        """Whether the plan may bring the tensor that the first load lacked, or lack it where that brought it.

        One of another shape is lacking too: the model cannot hold it.
        """
        return name in self._names and self._allows(name, plan)

    def refusal(self, name: str, plan: LoadPlan) -> str:
        """What to do about a tensor that may not differ."""
        if not self._allows(name, plan):
            return f"; where versions may lack it, say so in the first load: allow_missing={name!r}"
        if name in self._unknown:
            return "; it was on meta before the first load, so it has no value to go back to: build it on a device"
        return (
            f"; its value from before the first load was not kept, and a version without it would need that: what "
            f"allow_missing= and allow_mismatched= match takes more than {size(self._bound)}. Let them match fewer "
            "names, or make a new live model for versions like this one"
        )

    def _allows(self, name: str, plan: LoadPlan) -> bool:
        return any(self._may_lack(other, plan) for other in self._names.get(name, [name]))

    def _may_lack(self, name: str, plan: LoadPlan | None = None) -> bool:
        fates = {self._first.fates.get(name), None if plan is None else plan.fates.get(name)}
        return not fates.isdisjoint((Fate.MISSING, Fate.MISMATCHED)) or self._match(name)

    def absent(self, plan: LoadPlan, covers: Coverage) -> frozenset[str]:
        """Names of those that hold what an earlier version brought and that this plan does not write.

        Adapters are not among them: they come apart from the model under them, and stay.
        """
        owners = self.brought - set(plan.unproven) - covers.keys() - self._adapters
        return frozenset(name for owner in owners for name in self._names[owner])

    def is_needed(self, name: str) -> bool:
        """Whether a layer cannot be processed anew unless the tensor comes: its value is not that of the first load."""
        return name in self.brought or name not in self._names

    def came(self, plan: LoadPlan, covers: Coverage, restored: Collection[str]) -> None:
        """Take note that the model holds what came by this plan, and initial values in what was ``restored``."""
        self.brought -= set(restored)
        # What the model's own code loads by itself, no plan knows.
        self.brought |= self._names.keys() if plan.fallback else self._names.keys() & covers.keys()


def _candidates(
    model: nn.Module, first: LoadPlan, may_lack: Callable[[str], bool], layout: MemoryLayout
) -> list[_Candidate]:
    seen = survey(model)
    found = {name: name not in seen.transient for name in seen.tensors if name in layout}
    wrapped = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    parameters = {name for name, outer in seen.outer_names().items() if outer in wrapped}
    several: dict[int, list[str]] = {}
    for name, persistent in found.items():
        computed = persistent and name not in parameters
        if computed or may_lack(name):
            several.setdefault(layout.of(name), []).append(name)
    return [
        _Candidate(layout.nbytes[span], _owner(names, first), [name for name in layout.names(span) if name in found])
        for span, names in several.items()
        # Bytes that others see too would be put back under them.
        if len(layout.inside(span)) == 1
    ]


def _owner(names: list[str], plan: LoadPlan) -> str:
    return next((plan.targets[name].owner for name in names if name in plan.targets), names[0])
