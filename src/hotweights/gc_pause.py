"""Pausing garbage collection while many small objects are made that stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from .signals import held


@contextmanager
@held
def without_collection() -> Iterator[None]:
    """No automatic collection inside: each would look at all that was made so far, and double the time.

    Objects without cycles are freed as ever.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
