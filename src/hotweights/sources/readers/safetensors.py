"""safetensors, the reference implementation: ``safe_open``, one tensor after another.

Newer versions read with ``pread``. Older ones map the file: the memory changes with a file that is rewritten, and the
process is killed when the file is cut. So that memory counts as borrowed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from safetensors import safe_open

from ..pairs import Pair
from .reader import Reader

_CAN_PREAD = "backend" in (safe_open.__text_signature__ or "")  # Native code: it has no other signature.


def _read(files: Sequence[str], *, borrow: bool) -> Iterator[Pair]:
    for path in files:
        with safe_open(path, framework="pt", **({"backend": "pread"} if _CAN_PREAD else {})) as file:
            for name in file.offset_keys():
                yield name, file.get_tensor(name)


_UNKNOWN = frozenset(("F4", "F6_E2M3", "F6_E3M2"))

READER = Reader(_read, lends=not _CAN_PREAD, owns=_CAN_PREAD, unknown=_UNKNOWN)
