"""OpenLayers: which layers have scratch now, and how much device memory that takes."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable

import torch

from ..notices import log


def is_device(device: torch.device) -> bool:
    """Whether memory there is scarce: every device but ``cpu`` and ``meta``. Tests replace this one function."""
    return device.type not in ("cpu", "meta")


class OpenLayers:
    """The layers of one update whose scratch is open. Empty after commit and after abort.

    Attributes:
        limit: bytes of device memory that open layers may take together; ``None`` for no limit.
        peak_nbytes: the most device memory that was open at once.
        peak_layers: the most layers that were open at once.
        warned: whether the live model's one warning was given, by this update or one before.
        warning: the warning, if this update gave it.
    """

    def __init__(self, limit: int | None, *, warned: bool = False) -> None:
        self.limit = limit
        self.warned = warned
        self.peak_nbytes = 0
        self.peak_layers = 0
        self.warning = ""
        self._open: dict[Hashable, tuple[int, tuple[str, ...]]] = {}

    def __len__(self) -> int:
        return len(self._open)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that are open now."""
        return sum(nbytes for nbytes, _ in self._open.values())

    def fits(self, nbytes: int) -> bool:
        """Whether so many bytes more may be opened. What needs no device memory always may."""
        return nbytes == 0 or self.limit is None or self.nbytes + nbytes <= self.limit

    def open(self, group: Hashable, layers: Iterable[str], nbytes: int) -> None:
        """Take note that a group has its scratch: ``nbytes`` of device memory for these layers."""
        self._open[group] = nbytes, tuple(layers)
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)
        self.peak_layers = max(self.peak_layers, sum(len(names) for _, names in self._open.values()))
        on_device = [names for nbytes, names in self._open.values() if nbytes]
        if len(on_device) > 1 and not self.warned:
            self.warned = True
            names = sorted(name for names in on_device for name in names)
            self.warning = (
                f"{len(names)} layers are open at once and hold {self.nbytes / 1e6:.1f} MB of device memory: "
                f"{', '.join(names)}; weights that come layer by layer need only one at a time"
            )
            log(logging.WARNING, "%s", self.warning)

    def close(self, group: Hashable) -> None:
        """Take note that the group's scratch was freed."""
        self._open.pop(group, None)
