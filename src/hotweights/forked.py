"""Forked children: torch's threads do not survive a fork, and work that is shared out to them never ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .signals import held

_IMPORTED_IN = os.getpid()


@contextmanager
@held  # An update that was begun inside must reach whoever ends it.
def alone_in_a_fork() -> Iterator[None]:
    """Inside, torch works on one thread if this process was forked after hotweights was imported.

    A large copy would wait for ever for threads that only the parent has. Elsewhere this does nothing.
    """
    threads = torch.get_num_threads()
    if os.getpid() == _IMPORTED_IN or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
