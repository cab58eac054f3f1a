"""Pairs of a name and a tensor, as callers give them: each is checked when it comes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from ..errors import UsageError
from .state_dict import unfit

Pair = tuple[str, torch.Tensor]


def pairs_of(given: Iterable[Pair] | Mapping[str, torch.Tensor]) -> Iterator[Pair]:
    """The pairs of a mapping or of an iterable, one by one. None is held once the next is asked for.

    The tensors are not looked at: ``check_tensor`` does that.

    Raises:
        UsageError: it is neither, or what it gives is no pair that begins with a name.
    """
    if isinstance(given, Mapping):
        given = given.items()
    if isinstance(given, (str, bytes, torch.Tensor)) or not isinstance(given, Iterable):
        raise UsageError(
            f"weights are given as a mapping or as an iterable of (name, tensor); this is a {type(given).__name__}"
        )
    return _split(given)


def _split(given: Iterable[Pair]) -> Iterator[Pair]:
    for pair in given:
        yield split(pair)
        del pair  # The caller may use its memory again before it gives the next.


def split(pair: object) -> Pair:
    """Name and tensor. Raises ``UsageError`` if it is no pair that begins with a name."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        hint = "; one pair alone goes into a list: [(name, tensor)]" if isinstance(pair, str) else ""
        raise UsageError(f"an iterator of weights gives (name, tensor); this one gave a {type(pair).__name__}{hint}")
    name, tensor = pair
    if not isinstance(name, str):
        raise UsageError(f"an iterator of weights gives (name, tensor), but key {name!r} is no name")
    return name, tensor


def check_tensor(name: str, tensor: object) -> None:
    """Raise ``UsageError`` unless it is a tensor with values."""
    if (problem := unfit(name, tensor)) is not None:
        raise UsageError(f"an iterator of weights gives (name, tensor), but {problem}")
