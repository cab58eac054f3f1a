"""Payload: what a version is made of, as a source: opened and checked before anybody is told of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import signals
from ..errors import UsageError
from ..manifest import Manifest
from ..memory.wrappers import is_wrapper
from ..model.as_saved import as_saved
from ..rename import Rename, new_names
from ..sources.contracts import InMemory, Source
from ..sources.iterator import from_iterator
from ..sources.opening import is_pairs, opened
from ..sources.pairs import pairs_of
from ..sources.renamed import renamed
from ..sources.state_dict import StateSource, check_whole
from ..text import some
from .copying import wrapped


@contextmanager
@signals.held
def payload(tensors: Any, manifest: Manifest | None, rename: Rename | None) -> Iterator[Source]:
    """What is to be sent, as a source; one that is made here is closed here.

    Raises:
        UsageError: it holds what cannot be sent. In a stream of pairs that is met later.
    """
    with _opened(tensors, manifest) as found:
        source = found if rename is None else renamed(found, new_names(found.manifest, rename))
        check_whole(source.manifest)
        _check_bare(source)
        yield source


@contextmanager
@signals.held
def _opened(tensors: Any, manifest: Manifest | None) -> Iterator[Source]:
    if not is_pairs(tensors):
        with opened(as_saved(tensors) if isinstance(tensors, nn.Module) else tensors) as source:
            yield source
    elif manifest is not None:
        with from_iterator(tensors, manifest) as promised:
            yield promised
    else:
        with StateSource(_collected(tensors)) as state:
            yield state


def _collected(pairs: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors by name; no copies."""
    tensors: dict[str, torch.Tensor] = {}
    twice = set()
    for name, tensor in pairs_of(pairs):
        if name in tensors:
            twice.add(name)
        tensors[name] = tensor
    if twice:
        raise UsageError(f"two tensors have one name: {some(sorted(twice))}")
    return tensors


def _check_bare(source: Source) -> None:
    named = zip(source.manifest, in_memory(source), strict=False)
    if wrappers := {name: tensor for name, tensor in named if is_wrapper(tensor)}:
        raise UsageError(f"cannot send {some(list(wrappers))}: {wrapped(next(iter(wrappers.values())))}")


def in_memory(source: Source) -> list[torch.Tensor]:
    """The tensors, if they lie in memory. What computes them may be queued still, on a stream of this thread."""
    return [source.borrow(name) for name in source.manifest] if isinstance(source, InMemory) else []
