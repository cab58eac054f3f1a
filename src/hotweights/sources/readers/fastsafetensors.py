"""fastsafetensors: each file is read into one buffer, of which its tensors are views. On the CPU.

Its tensors keep their file's whole buffer alive. With ``borrowed_tensors`` they do not: it goes when the file is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

from fastsafetensors import SafeTensorsFileLoader

from ..iterators import Pair
from .reader import Reader

__all__ = ["READER"]


def _read(files: Sequence[str], *, borrow: bool) -> Iterator[Pair]:
    for path in files:  # All at once would take the memory of the whole checkpoint.
        with closing(SafeTensorsFileLoader(None, device="cpu", nogds=True)) as loader:
            loader.add_filenames({0: [path]})
            with closing(loader.copy_files_to_device(borrowed_tensors=borrow)) as buffers:
                for name in loader.get_keys():
                    yield name, buffers.get_tensor(name)


READER = Reader(_read, lends=True, owns=True)
