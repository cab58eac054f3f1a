"""Accounting: which layers are open, and what memory that takes on the device. It opens none itself."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable

import torch

_log = logging.getLogger("hotweights")


def is_device(device: torch.device) -> bool:
    """Whether memory there is scarce: every device but ``cpu`` and ``meta``. Tests replace this one function."""
    return device.type not in ("cpu", "meta")


class OpenLayers:
    """Layers whose scratch is open, by update. Empty after commit and after abort.

    Attributes:
        limit: bytes of device memory that open layers may take together; ``None`` for no limit.
        peak_nbytes: the most that was open at once, on devices, in this update.
        peak_layers: how many layers that were.
        warned: whether the one warning was given. It belongs to the live model, which hands it on.
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
        """Whether so much more may be opened. What needs no device memory always may."""
        return nbytes == 0 or self.limit is None or self.nbytes + nbytes <= self.limit

    def open(self, unit: Hashable, layers: Iterable[str], nbytes: int) -> None:
        """A unit's scratch is open from now on."""
        self._open[unit] = nbytes, tuple(layers)
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)
        self.peak_layers = max(self.peak_layers, sum(len(names) for _, names in self._open.values()))
        several = {one: found for one, found in self._open.items() if found[0]}
        if len(several) > 1 and not self.warned:
            self.warned = True
            names = sorted(name for _, found in several.values() for name in found)
            self.warning = (
                f"{len(names)} layers are open at once and hold {self.nbytes / 1e6:.1f} MB of device memory: "
                f"{', '.join(names)}; weights that come layer by layer need only one at a time"
            )
            _log.warning("%s", self.warning)

    def close(self, unit: Hashable) -> None:
        """Its scratch is freed."""
        self._open.pop(unit, None)
