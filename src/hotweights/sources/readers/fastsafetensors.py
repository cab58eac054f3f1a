"""fastsafetensors: each file is read into one buffer, and its tensors are views of that. On the CPU, and borrowed.

The package can give tensors away, but then Python code frees them, and an exception that is on its way while it runs is
lost (0.5.0). So tensors that are kept are copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

from fastsafetensors import SafeTensorsFileLoader

from ..pairs import Pair
from .reader import Reader


def _read(files: Sequence[str], *, borrow: bool) -> Iterator[Pair]:
    for path in files:  # All files at once would take the memory of the whole checkpoint.
        with closing(SafeTensorsFileLoader(None, device="cpu", nogds=True)) as loader:
            loader.add_filenames({0: [path]})
            with closing(loader.copy_files_to_device(borrowed_tensors=True)) as buffers:
                for name in loader.get_keys():
                    yield name, buffers.get_tensor(name)


_UNKNOWN = frozenset(("F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"))

READER = Reader(_read, lends=True, owns=False, unknown=_UNKNOWN)
