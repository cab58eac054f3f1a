"""Ways to be all or nothing: in place, with a journal, staged. The only file that writes live tensors of an update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, Protocol

import torch
from torch import nn

from ..devices import pinned_empty
from ..errors import HotweightsError
from ..memory import host_empty
from ..report import size
from .layers import Contents, contents, put
from .spans import Mirror, has_bytes

__all__ = ["Atomic", "InPlace", "Journal", "Staged", "Way", "check_room", "host_available", "host_copy"]

Atomic = Literal["staged", "journal", False]
"""How an update is all or nothing: collected beside the live version; written in place, the old bytes kept; not."""


class Way(Protocol):
    """Where an update's bytes go. ``commit`` and ``abort`` cannot fail but for what the machine does."""

    name: Atomic
    wrote: bool
    """Whether a live tensor may have changed."""
    exclusive: bool
    """Whether live tensors change before the commit, so that nobody may read them from the first write on."""

    def direct(self, names: Iterable[str], partial: Iterable[str]) -> Mapping[str, torch.Tensor]:
        """Memory for tensors that are written as they are; those of ``partial`` keep some of their bytes."""

    def deliver(self, name: str, value: torch.Tensor) -> None:
        """The new value of a live tensor; it is not kept."""

    def attribute(self, module: nn.Module, held: Contents) -> None:
        """What a module shall hold beside its tensors."""

    def value(self, name: str) -> torch.Tensor:
        """The tensor as it will be: what was delivered, or else what is live."""

    def commit(self) -> int:
        """Make it version M; returns the bytes that were written by this call."""

    def abort(self) -> None:
        """Make it version N again."""


class InPlace:
    """Nothing is kept. A failure leaves tensors of two versions."""

    name: Atomic = False
    exclusive = True

    def __init__(self, live: Mapping[str, torch.Tensor]) -> None:
        self._live = live
        self.wrote = False

    def direct(self, names: Iterable[str], partial: Iterable[str]) -> Mapping[str, torch.Tensor]:
        """The live tensors themselves."""
        names = list(names)
        self._keep(names)
        self.wrote = True
        return {name: self._live[name] for name in names}

    def deliver(self, name: str, value: torch.Tensor) -> None:
        """Copy into the live tensor."""
        live = self._live[name]
        if live.numel() == 0:
            return
        if not has_bytes(live):
            raise HotweightsError(f"{name}: is a {type(live).__name__}, which cannot be written in place")
        self._keep([name])
        self.wrote = True
        _copy(live, value)

    def attribute(self, module: nn.Module, held: Contents) -> None:
        """Put it in place."""
        put(module, held)

    def value(self, name: str) -> torch.Tensor:
        """The live tensor."""
        return self._live[name]

    def commit(self) -> int:
        """Nothing is left to do."""
        return 0

    def abort(self) -> None:
        """Nothing can be done."""

    def _keep(self, names: Iterable[str]) -> None:
        """Called before each write."""


class Journal(InPlace):
    """The old bytes are kept on the host until commit; an abort puts every one of them back."""

    name: Atomic = "journal"

    def __init__(self, live: Mapping[str, torch.Tensor], mirror: Mirror) -> None:
        super().__init__(live)
        self._mirror = mirror
        self._saved: dict[str, None] = {}
        self._held: list[tuple[nn.Module, Contents]] = []

    def attribute(self, module: nn.Module, held: Contents) -> None:
        """Put it in place, and remember what was there."""
        self._held.append((module, contents(module)))
        put(module, held)

    def abort(self) -> None:
        """Put everything back, the last first."""
        for module, held in reversed(self._held):
            put(module, held)
        for name in reversed(self._saved):
            _copy(self._live[name], self._mirror[name])
        self._saved.clear()
        self._held.clear()

    def _keep(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._saved and has_bytes(self._live[name]):
                _copy(self._mirror[name], self._live[name])
                self._saved[name] = None


class Staged:
    """The new version is collected on the host beside the live one; commit copies it, abort forgets it."""

    name: Atomic = "staged"
    exclusive = False
    wrote = False

    def __init__(self, live: Mapping[str, torch.Tensor], mirror: Mirror) -> None:
        self._live = live
        self._mirror = mirror
        self._staged: dict[str, None] = {}
        self._held: list[tuple[nn.Module, Contents]] = []

    def direct(self, names: Iterable[str], partial: Iterable[str]) -> Mapping[str, torch.Tensor]:
        """Memory beside the live tensors, with their bytes where not all will be written."""
        names = [name for name in names if has_bytes(self._live[name])]
        for name in set(partial).intersection(names):
            _copy(self._mirror[name], self._live[name])
        self._staged.update(dict.fromkeys(names))
        return {name: self._mirror[name] for name in names}

    def deliver(self, name: str, value: torch.Tensor) -> None:
        """Collect it."""
        live = self._live[name]
        if live.numel() == 0:
            return
        if not has_bytes(live):
            raise HotweightsError(f"{name}: is a {type(live).__name__}, which cannot be written in place")
        _copy(self._mirror[name], value)
        self._staged[name] = None

    def attribute(self, module: nn.Module, held: Contents) -> None:
        """Remember it."""
        self._held.append((module, held))

    def value(self, name: str) -> torch.Tensor:
        """What was collected, on the live tensor's device."""
        return self._mirror[name].to(self._live[name].device) if name in self._staged else self._live[name]

    def commit(self) -> int:
        """Copy everything into place."""
        nbytes = 0
        for name in self._staged:
            _copy(self._live[name], self._mirror[name])
            nbytes += self._live[name].nbytes
        for module, held in self._held:
            put(module, held)
        self.abort()
        return nbytes

    def abort(self) -> None:
        """Forget it."""
        self._staged.clear()
        self._held.clear()


def _copy(target: torch.Tensor, value: torch.Tensor) -> None:
    with torch.inference_mode() if target.is_inference() else torch.no_grad():
        target.detach().copy_(value.detach())


def host_available() -> int | None:
    """Bytes of host memory that can still be taken, as the kernel reckons; ``None`` where it does not say."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def check_room(mirror: Mirror, names: Iterable[str], atomic: Atomic) -> None:
    """See that the host can hold a copy of these tensors, before the first is written.

    Raises:
        HotweightsError: it cannot.
    """
    needed, there = mirror.lacking(names), host_available()
    if there is not None and needed > there:
        raise HotweightsError(
            f"atomic={atomic!r} keeps a copy of the model on the host: {size(needed)} more are needed, {size(there)} "
            "are there; nothing was written. atomic=False keeps no copy"
        )


def host_copy(nbytes: int, device: torch.device) -> torch.Tensor:
    """Memory on the host for what lies on ``device``; pinned where that is an accelerator."""
    return host_empty((nbytes,), torch.uint8) if device.type == "cpu" else pinned_empty(nbytes)
