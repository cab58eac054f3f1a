"""Naming: the names that a source's tensors get before they are planned, by ``rename=`` and through wrappers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

from torch import nn

from ..manifest import Manifest
from ..model.matching import matched
from ..model.survey import By, own_loader
from ..rename import Rename, new_names
from ..shell import outer_names, renamed_inside
from ..sources.contracts import Source
from ..sources.renamed import renamed

Match = Callable[[Collection[str]], Mapping[str, str]]
"""From the names of a source to those of them that the model knows by another name."""


def match_for(model: nn.Module, known: Collection[str], by: By | None) -> Match:
    """How the names of a source become those of ``known``, the tensors of ``model``, which is unwrapped.

    Loading code of the model's own gets the names as they are: it knows what it does.
    """
    return partial(matched, model, known) if own_loader(model, by) is None else as_they_are


def as_they_are(names: Collection[str]) -> Mapping[str, str]:
    """No name changes."""
    return {}


def names_for(manifest: Manifest, rename: Rename | None, match: Match) -> dict[str, str]:
    """The new names of those tensors whose name changes: by ``rename`` first, then through wrapping modules.

    Raises:
        PlanError: names become the same one, or fit several tensors.
    """
    if rename is None and not manifest.wrapped:
        return {name: fresh for name, fresh in match(manifest).items() if name != fresh}
    outer = outer_names(manifest)
    said = new_names(dict.fromkeys(outer.values()), rename)
    means = match(said.values())
    new = renamed_inside(outer, {name: means.get(fresh, fresh) for name, fresh in said.items()})
    return {name: fresh for name, fresh in new.items() if fresh != name}


def fitted(source: Source, rename: Rename | None, match: Match) -> Source:
    """The source under the names that the model knows, see ``names_for``."""
    return renamed(source, names_for(source.manifest, rename, match))
