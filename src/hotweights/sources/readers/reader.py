"""Reader: what one package that reads checkpoints can do. It knows no package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from ..files.shards import SAFETENSORS, Layout
from ..iterator import Pair


class Read(Protocol):
    """Opens files and gives their tensors, in whatever order; closing the iterator closes the files."""

    def __call__(self, files: Sequence[str], *, borrow: bool) -> Iterator[Pair]:
        """With ``borrow``, each tensor need only live until the iterator advances, if that is cheaper."""


class Reader(NamedTuple):
    """One package.

    Attributes:
        read: how it reads.
        lends: whether what it reads with ``borrow`` lies in memory that is used again.
        owns: whether what it reads without lies in memory of its own for good.
        layout: the files it reads.
    """

    read: Read
    lends: bool
    owns: bool
    layout: Layout = SAFETENSORS
