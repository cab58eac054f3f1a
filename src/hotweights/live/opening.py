"""Opening: whatever an update takes as a source, as an open one. It reads none."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import UsageError
from ..sources import open as open_source
from ..sources.contracts import Source
from ..sources.iterators import IteratorSource

__all__ = ["AnySource", "opened", "version_of"]

AnySource = str | os.PathLike[str] | Mapping[str, torch.Tensor] | nn.Module | Source


def version_of(source: Source, version: str | int | None) -> str | int | None:
    """The version's name: what was said, or else what the source says."""
    found: str | int | None = getattr(source, "version", None) if version is None else version
    return found


@contextmanager
def opened(source: AnySource) -> Iterator[Source]:
    """The source; one that is opened here is closed here."""
    if isinstance(source, (str, os.PathLike, Mapping, nn.Module)):
        with open_source(source) as found:
            yield found
    elif isinstance(source, IteratorSource) and not isinstance(source, Source):
        with source.collect() as found:
            yield found
    elif isinstance(source, Source):
        yield source
    else:
        raise UsageError(
            f"a source is a path, a mapping of tensors, a module or a Source; found {type(source).__name__}"
        )
