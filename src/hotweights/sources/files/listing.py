"""Listing: what the files of a checkpoint hold, by their headers. It does not need torch, and keeps nothing open."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ...manifest import TensorSpec
from .header import FileHeader, as_format, read_header
from .layout import SAFETENSORS
from .place import Readable, Remote
from .shards import open_checkpoint


@dataclass(frozen=True, slots=True)
class Listed:
    """One tensor: its dtype and shape as the format has them, its file, and its first byte there."""

    spec: TensorSpec
    file: str
    offset: int | None


@dataclass(frozen=True, slots=True)
class Listing:
    """What the files hold.

    Attributes:
        files: their paths.
        metadata: the free text of each file, by path.
        warnings: what a person should read.
        tensors: all of them, file by file.
    """

    files: tuple[str, ...]
    metadata: dict[str, dict[str, str]]
    warnings: tuple[str, ...]
    tensors: tuple[Listed, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.spec.nbytes for tensor in self.tensors)


def list_checkpoint(
    path: str | os.PathLike[str] | Remote, *, variant: str | None = None, subfolder: str | None = None
) -> Listing:
    """Read and check every header of the checkpoint.

    Raises:
        CheckpointError: with every problem that was found.
    """
    checkpoint = open_checkpoint(path, SAFETENSORS._replace(parse=_parse), variant=variant, subfolder=subfolder)
    try:
        shards = checkpoint.shards
        return Listing(
            files=tuple(shard.file.path for shard in shards),
            metadata={shard.file.path: dict(shard.header.metadata) for shard in shards},
            warnings=checkpoint.warnings,
            tensors=tuple(
                Listed(entry.spec, shard.file.path, entry.offset) for shard in shards for entry in shard.header.entries
            ),
        )
    finally:
        checkpoint.close()


def _parse(file: Readable) -> FileHeader:
    return read_header(file.path, file.size, file.pread, as_format)
