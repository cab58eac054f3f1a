"""runai-model-streamer: its own threads fill a ring of buffers, of ``RUNAI_STREAMER_MEMORY_LIMIT`` bytes.

Up to 0.16 the ring is always used again. Since 0.17, ``owned=True`` gives a buffer away once it is drained, and takes a
new one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import closing

from runai_model_streamer import SafetensorsStreamer

from ..pairs import Pair
from .reader import Reader

_CAN_OWN = "owned" in inspect.signature(SafetensorsStreamer.stream_files).parameters


def _read(files: Sequence[str], *, borrow: bool) -> Iterator[Pair]:
    with SafetensorsStreamer() as streamer:
        if _CAN_OWN:
            streamer.stream_files(list(files), owned=not borrow)
        else:
            streamer.stream_files(list(files))
        # Close the pairs before the streamer ends: its threads may still write into the ring.
        with closing(streamer.get_tensors()) as pairs:
            yield from pairs


_UNKNOWN = frozenset(("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"))

READER = Reader(_read, lends=True, owns=_CAN_OWN, unknown=_UNKNOWN)
