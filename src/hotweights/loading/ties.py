"""Tied weights: names of one tensor in the model must carry the same bytes. The plan says which (``plan.ties``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ..errors import TiedWeightsDiffer
from ..manifest import Manifest
from ..plan.plan import LoadPlan
from ..plan.steps import Copy
from .copy_step import Destinations, part_of, place_of

COMPARED = 8 * 1024 * 1024  # bytes of each of two tied tensors that are compared at once


def same_as_written(skipped: Copy, tensor: torch.Tensor, done: Copy, destinations: Destinations) -> bool:
    """Whether ``skipped`` would have written, from its source ``tensor``, the bits that ``done`` wrote."""
    place = place_of(done, destinations)
    return same_bits(part_of(skipped, tensor).to(place.dtype), place.cpu())


def prove_ties(plan: LoadPlan, manifest: Manifest, equal: Callable[[Copy, Copy], bool]) -> None:
    """Compare the sources of tied names before anything is written; raise ``TiedWeightsDiffer`` if any two differ."""
    refuse_ties(pair for pair in plan.ties if manifest[pair[0].source].nbytes and not equal(*pair))


def refuse_ties(differing: Iterable[tuple[Copy, Copy]]) -> None:
    """Raise ``TiedWeightsDiffer`` if there is any pair."""
    problems = [
        f"{first.source} and {second.source} are one tensor in the model, and differ in the source"
        for first, second in differing
    ]
    if problems:
        raise TiedWeightsDiffer("tied weights differ", problems)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes, as they would be written in row-major order."""
    # Bits, not values: a NaN is equal to itself here, and -0.0 differs from 0.0.
    return torch.equal(left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))
