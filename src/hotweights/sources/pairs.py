"""Pairs of a name and a tensor, as callers give them: each is checked when it comes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from ..arguments import shown
from ..errors import UsageError
from ..manifest import TensorSpec
from .state_dict import bare

Pair = tuple[str, torch.Tensor]

_GIVEN = "weights are given as pairs of a name and a tensor, or as a mapping of them"


def pairs_of(given: Iterable[Pair] | Mapping[str, torch.Tensor]) -> Iterator[Pair]:
    """The pairs of a mapping or of an iterable, one by one. None is held once the next is asked for.

    The tensors of an iterator are not looked at: ``plain`` does that.

    Raises:
        UsageError: it is neither, or what it gives is no pair that begins with a name; of a list or a mapping, this is
            found before the first pair is given.
    """
    if isinstance(given, Mapping):
        given = list(given.items())
    if isinstance(given, nn.Module):
        raise UsageError(f"{_GIVEN}; found {shown(given)}; its weights are module.state_dict()")
    if isinstance(given, (str, bytes, torch.Tensor)) or not isinstance(given, Iterable):
        raise UsageError(f"{_GIVEN}; found {shown(given)}")
    if isinstance(given, (tuple, list)):
        if len(given) == 2 and isinstance(given[0], str):
            raise UsageError(f"{_GIVEN}; found a single pair, which goes into a list: [(name, tensor)]")
        for pair in given:
            split(pair)
    return _split(given)


def _split(given: Iterable[Pair]) -> Iterator[Pair]:
    for pair in given:
        yield split(pair)
        del pair  # The caller may use its memory again before it gives the next.


def split(pair: object) -> Pair:
    """Name and tensor. Raises ``UsageError`` if it is no pair that begins with a name."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise UsageError(f"{_GIVEN}; found {shown(pair)} among them")
    name, tensor = pair
    if not isinstance(name, str):
        raise UsageError(f"{_GIVEN}; found a pair of {shown(name)} and {shown(tensor)}")
    return name, tensor


def plain(name: str, tensor: object, promised: TensorSpec | None = None) -> torch.Tensor:
    """The tensor, or what this rank holds of a DTensor of which that part was ``promised``.

    Raises:
        UsageError: it is no tensor with plain bytes, or another part.
    """
    here, problem = bare(name, tensor, promised)
    if problem is not None:
        raise UsageError(f"{_GIVEN}; {problem}")
    return here
