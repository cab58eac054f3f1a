"""LoadPlan: which source tensors become which destinations. Pure data: no modules, no bytes but small constants."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import Literal

import torch

from ..arguments import check_choices
from ..manifest import Manifest
from ..text import as_html, counts
from . import explain
from .saved import file as planfile
from .steps import Copy, Fate, GraphBreak, Step, Target, layer_of

Order = Literal["layer", "file", "given"]
"""In which order independent steps are done: layer by layer, as their sources lie in the files, or as traced."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What will be done, and what becomes of every name. Made before the first byte is read; keeps no model alive.

    Attributes:
        steps: what to do, in an order that may be followed as it stands.
        levels: of each step; a step begins when all of lower levels are done. Steps of one level are independent.
        ties: pairs of copies to one place; the second is compared, not written.
        fates: by tensor of the source; and, for ``MISSING``, ``PARTIAL`` and ``MISMATCHED``, by name of the model.
        casts: by source name, "from -> to" dtypes.
        mismatched: by name of the model, both shapes, of what is not loaded because of them.
        constants: tensors that programs use, by name.
        fallback: names of the source tensors that no step can load; the model's own code gets them, owned.
        graph_breaks: what that code did that a plan cannot repeat.
        unproven: names of the model that only that code can write; whether it did is seen when it runs.
        side_effects: attributes that the loading code changes and following the plan does not.
        state_read: tensors of the model whose values the loading code asked for; the plan holds for these values.
        manifest: of the source that it is made for.
        targets: the tensors of the model that it is made for, including those that only a step names.
        digests: of the values of ``state_read``, by name.
        by_layer: whether each layer is done before the next begins, as far as levels allow.
        transient: by name of each non-persistent buffer, the tensor with whose memory it shares bytes; empty if none.
        processed: layers that a live model had processed by then, so that their tensors are not those of a checkpoint.
    """

    steps: tuple[Step, ...]
    ties: tuple[tuple[Copy, Copy], ...]
    fates: Mapping[str, Fate]
    casts: Mapping[str, str]
    levels: tuple[int, ...] = ()
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    fallback: tuple[str, ...] = ()
    graph_breaks: tuple[GraphBreak, ...] = ()
    unproven: tuple[str, ...] = ()
    side_effects: tuple[str, ...] = ()
    state_read: tuple[str, ...] = ()
    manifest: Manifest = field(default_factory=lambda: Manifest(()))
    targets: Mapping[str, Target] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    by_layer: bool = False
    mismatched: Mapping[str, str] = field(default_factory=dict)
    transient: Mapping[str, str] = field(default_factory=dict)
    processed: tuple[str, ...] = ()

    def names(self, fate: Fate) -> tuple[str, ...]:
        """The names with this fate, sorted."""
        if fate not in self.fates.values():  # Most are of one fate, and this asks for all of them.
            return ()
        return tuple(sorted(name for name, reached in self.fates.items() if reached is fate))

    def by_level(self) -> Iterator[tuple[Step, ...]]:
        """The steps of each level, lowest first."""
        if not self.levels:
            yield self.steps
            return
        several: dict[int, list[Step]] = defaultdict(list)
        for level, step in zip(self.levels, self.steps, strict=True):
            several[level].append(step)
        for level in sorted(several):
            yield tuple(several[level])

    def batches(self) -> Iterator[tuple[Step, ...]]:
        """The steps in batches, each to be done before the next begins: one a level, or one a layer of each level."""
        for steps in self.by_level():
            if self.by_layer:
                yield from (tuple(several) for _, several in groupby(steps, key=layer_of))
            else:
                yield steps

    # Order.

    def ordered(self, order: Order, position: Callable[[str], tuple[int, int]] | None = None) -> LoadPlan:
        """The same plan with its steps in another order; a step still comes after all of lower levels.

        Args:
            order: ``"layer"``: as the modules that own the destinations appear in the model, then by position;
                ``"file"``: by position; ``"given"``: as they are.
            position: where a source tensor lies, ``source.position``; by default its place in the manifest.
        """
        check_choices(order=(order, Order))
        if order == "given":
            return replace(self, by_layer=False)
        if position is None:
            places = {name: (0, number) for number, name in enumerate(self.manifest)}
            position = places.__getitem__
        layers: dict[str, int] = {}
        for name in self.targets:
            layers.setdefault(name.rpartition(".")[0], len(layers))
        where = position

        def key(item: tuple[int, Step]) -> tuple[int, int, tuple[int, int]]:
            level, step = item
            layer = layers.get(layer_of(step), len(layers)) if order == "layer" else 0
            return level, layer, min(map(where, step.sources), default=(-1, -1))

        pairs = sorted(zip(self.levels or [0] * len(self.steps), self.steps, strict=True), key=key)
        return replace(
            self,
            steps=tuple(step for _, step in pairs),
            levels=tuple(level for level, _ in pairs) if self.levels else (),
            by_layer=order == "layer",
        )

    # Keeping it.

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file, all of it or nothing.

        Raises:
            PlanFileError: it holds an operation that no file may name; it can still be used as it is.
        """
        planfile.write(path, {part.name: getattr(self, part.name) for part in fields(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LoadPlan:
        """Read a plan that ``save`` wrote. It runs no code of the file; ``hw.load(plan=)`` checks that it fits.

        Raises:
            PlanFileError: the file is damaged, of another version, or no plan.
        """
        return cls(**planfile.read(path))

    def differences(self, manifest: Manifest, targets: Mapping[str, Target]) -> list[str]:
        """What is not as it was when the plan was made: a line for each tensor of the source or the model."""
        return list(explain.differences(self, manifest, targets))

    # For people: the words are in explain.py.

    def explain(self, name: str) -> str:
        """In words: which parts of which source tensors become the model's tensor ``name``, and how.

        Raises:
            UnknownName: neither model nor source has this name; the message lists similar ones.
        """
        return explain.explain(self, name)

    def rows(self, step: Step) -> Iterator[tuple[str, str, str]]:
        """For a table: a destination, how it comes to be, and from what."""
        return explain.rows_of(self, step)

    def __repr__(self) -> str:
        fates = Counter(fate.value for fate in self.fates.values())
        found = counts({**fates, "graph breaks": len(self.graph_breaks)})
        return f"<LoadPlan of {len(self.steps)} steps: {found or 'no tensors'}>"

    def _repr_html_(self) -> str:
        return as_html(self)

    def __str__(self) -> str:
        return explain.summarise(self)
