"""Layout: how one format of checkpoints lies on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .header import FileHeader, read_header
from .place import Readable


class Layout(NamedTuple):
    """How one format lies on disk.

    Attributes:
        stems: the names, without suffix, by which ``from_pretrained`` finds weights; the first one goes first.
        suffix: how the names of its files end.
        parse: reads what a file holds; raises ``CheckpointError``.
    """

    stems: tuple[str, ...]
    suffix: str
    parse: Callable[[Readable], FileHeader]


def _parse_safetensors(file: Readable) -> FileHeader:
    return read_header(file.path, file.size, file.pread)


DIFFUSERS = "diffusion_pytorch_model"
"""The stem that diffusers uses, in every format. Its index goes before a whole file; with transformers it is behind."""

SAFETENSORS = Layout(("model", DIFFUSERS), ".safetensors", _parse_safetensors)
