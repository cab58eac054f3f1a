"""Reader: what one package that reads checkpoints can do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from ..files.layout import SAFETENSORS, Layout
from ..pairs import Pair


class ReadFiles(Protocol):
    """Opens files and gives their tensors, in any order. Closing the iterator closes the files."""

    def __call__(self, files: Sequence[str], *, borrow: bool) -> Iterator[Pair]:
        """With ``borrow``, a tensor need only be valid until the iterator advances, if that is cheaper."""


class Reader(NamedTuple):
    """One package.

    Attributes:
        read: how it reads.
        lends: whether tensors that it reads with ``borrow`` lie in memory that is used again.
        owns: whether tensors that it reads without ``borrow`` lie in memory of their own for good.
        layout: the files it reads.
        unknown: the format's dtypes that some version of it refuses; it refuses the whole file with them.
    """

    read: ReadFiles
    lends: bool
    owns: bool
    layout: Layout = SAFETENSORS
    unknown: frozenset[str] = frozenset()
