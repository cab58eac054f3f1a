"""Sync: what one sync of a trainer's weights did; and what the trainer asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

from ...text import size

_LOG = logging.getLogger("hotweights")


@dataclass(frozen=True, slots=True)
class Sync:
    """A version that vLLM has taken.

    Attributes:
        version: counts the syncs of a trainer; also in vLLM's outputs.
        nbytes: of the tensors that were sent or fed.
        seconds: of the whole sync, with what the trainer gathers and merges.
        stall_seconds: how long vLLM did not step because of it.
    """

    version: int
    nbytes: int
    seconds: float
    stall_seconds: float


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """What ``enable`` was given, see there."""

    address: str | None = None
    timeout: float = 60.0
    on_sync: Callable[[Sync], object] | None = None
    keys: str | os.PathLike[str] | None = None
    insecure: bool = False

    def tell(self, sync: Sync) -> None:
        """Log a sync, and tell whoever asked."""
        _LOG.info(
            "hotweights: vLLM has version %d, %s in %.2f s, stall %.2f s",
            *(sync.version, size(sync.nbytes), sync.seconds, sync.stall_seconds),
        )
        if self.on_sync is not None:
            self.on_sync(sync)
