"""Ways to be all or nothing: in place, with a journal, staged. The only file that writes live tensors of an update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import nn

from ..errors import HotweightsError
from ..memory import host
from ..memory.aliases import has_bytes
from ..memory.wrappers import is_wrapper
from ..model.materialise import dressed
from ..text import size
from .attributes import amend, assign, exchanged, state_of
from .layers import contents, put
from .layout import Mirror

Atomic = Literal["staged", "journal", False]
"""How an update is all or nothing: collected beside the live version; written in place, the old bytes kept; not."""


Changes = Mapping[Any, object]
"""Of the state of a module, a tensor or a holder: values by key, or ``holders.ABSENT``."""


class Strategy(Protocol):
    """Where an update's bytes go. ``commit`` and ``abort`` may be called again when they were interrupted."""

    name: Atomic
    wrote: bool
    """Whether a live tensor may have changed; whoever writes into what ``direct`` gave says so."""
    exclusive: bool
    """Whether live tensors change before the commit, so that nobody may read them from the first write on."""

    def direct(self, names: Iterable[str], partial: Iterable[str]) -> Mapping[str, torch.Tensor]:
        """Memory for tensors that are written as they are; those of ``partial`` keep some of their bytes."""

    def deliver(self, name: str, value: torch.Tensor) -> None:
        """The new value of a live tensor; it is not kept."""

    def attribute(self, holder: object, changes: Changes) -> None:
        """What changes in the state of a live module, tensor or holder."""

    def showing(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, the model is what it will be: what was delivered, or else what is live."""

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
        return {name: self._live[name] for name in names}

    def deliver(self, name: str, value: torch.Tensor) -> None:
        """Copy into the live tensor."""
        if _takes_bytes(name, self._live[name]):
            self._keep([name])
            self.wrote = True
            host.copy_bytes(self._live[name], value)

    def attribute(self, holder: object, changes: Changes) -> None:
        """Put it in place."""
        self.wrote = True
        amend(holder, changes)

    @contextmanager
    def showing(self, model: nn.Module) -> Iterator[None]:
        """It is so already."""
        yield

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
        self._saved: set[int] = set()  # spans
        self._held: list[tuple[object, dict[Any, object]]] = []

    def attribute(self, holder: object, changes: Changes) -> None:
        """Put it in place, and remember what was there."""
        self._held.append((holder, state_of(holder)))
        super().attribute(holder, changes)

    def abort(self) -> None:
        """Put everything back, the last first."""
        for holder, held in reversed(self._held):
            assign(holder, held)
        for span in self._saved:
            for name in self._mirror.spans.inside(span):
                host.copy_bytes(self._live[name], self._mirror[name])

    def _keep(self, names: Iterable[str]) -> None:
        spans = self._mirror.spans
        for span in dict.fromkeys(spans.of(name) for name in names if name in spans):
            # All that overlaps at once: saved one by one, the second would be saved when the first was written over.
            if span not in self._saved:
                for name in spans.inside(span):
                    host.copy_bytes(self._mirror[name], self._live[name])
                self._saved.add(span)


class Staged:
    """The new version is collected on the host beside the live one; commit copies it, abort forgets it."""

    name: Atomic = "staged"
    exclusive = False

    def __init__(self, live: Mapping[str, torch.Tensor], mirror: Mirror) -> None:
        self._live = live
        self._mirror = mirror
        self.wrote = False
        self._staged: dict[str, None] = {}
        self._held: list[tuple[object, dict[Any, object]]] = []

    def direct(self, names: Iterable[str], partial: Iterable[str]) -> Mapping[str, torch.Tensor]:
        """Memory beside the live tensors, with their bytes where not all will be written."""
        names = [name for name in names if name in self._mirror.spans]
        for name in set(partial).intersection(names):
            host.copy_bytes(self._mirror[name], self._live[name])
        self._staged.update(dict.fromkeys(names))
        return {name: self._mirror[name] for name in names}

    def deliver(self, name: str, value: torch.Tensor) -> None:
        """Collect it."""
        if _takes_bytes(name, self._live[name]):
            host.copy_bytes(self._mirror[name], value)
            self._staged[name] = None

    def attribute(self, holder: object, changes: Changes) -> None:
        """Remember it."""
        self._held.append((holder, dict(changes)))

    @contextmanager
    def showing(self, model: nn.Module) -> Iterator[None]:
        """Put what was collected into the model's places, and take it out again."""
        shown = {id(self._live[name]): self._value(name) for name in self._staged}
        modules = list(model.modules())
        own = frozenset(map(id, modules))
        before = [(module, contents(module, own)) for module in modules]
        try:
            for module, held in before:
                put(module, held.replaced({key: shown[id(one)] for key, one in held.tensors() if id(one) in shown}))
            for holder, changes in self._held:
                if not isinstance(holder, torch.Tensor):
                    amend(
                        holder,
                        {key: exchanged("", one, lambda _, t: shown.get(id(t), t)) for key, one in changes.items()},
                    )
            yield
        finally:
            for module, held in before:
                put(module, held)

    def _value(self, name: str) -> torch.Tensor:
        live = self._live[name]
        return dressed(self._mirror[name].to(live.device), live)

    def commit(self) -> int:
        """Copy everything into place."""
        nbytes = 0
        for name in self._staged:
            host.copy_bytes(self._live[name], self._mirror[name])
            nbytes += self._live[name].nbytes
        for holder, changes in self._held:
            amend(holder, changes)
        return nbytes

    def abort(self) -> None:
        """Nothing was written."""


def _takes_bytes(name: str, live: torch.Tensor) -> bool:
    if nn.parameter.is_lazy(live) or live.numel() == 0 or is_wrapper(live):  # What it wraps has names of its own.
        return False
    if not has_bytes(live):
        raise HotweightsError(f"{name}: is a {type(live).__name__}, which cannot be written in place")
    return True


def check_room(mirror: Mirror, names: Iterable[str], atomic: Atomic) -> None:
    """See that the host can hold a copy of these tensors, before the first is written.

    Raises:
        HotweightsError: it cannot.
    """
    needed, there = mirror.lacking(names), host.host_available()
    if there is not None and needed > there:
        raise HotweightsError(
            f"atomic={atomic!r} keeps a copy of the model on the host: {size(needed)} more are needed, {size(there)} "
            "are there; nothing was written. atomic=False keeps no copy"
        )
