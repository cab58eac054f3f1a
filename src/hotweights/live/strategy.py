"""Strategy: how an update is all or nothing. Staged, Journal and InPlace are the only writers of its live tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import nn

from .. import signals
from ..errors import LiveModelError
from ..memory import host
from ..memory.aliases import has_bytes
from ..memory.copies import copy_all, spares_threads
from ..memory.exchange import exchange_bytes
from ..memory.extents import Extents
from ..memory.wrappers import is_wrapper
from ..model.materialise import dressed
from ..text import size
from .attributes import amend, assign, exchanged, state_of
from .layers import Contents, contents, modules_held, put, put_back
from .layout import Mirror

Atomic = Literal["staged", "journal", False]
"""How an update is all or nothing.

``"staged"``: the new version is collected on the host while the old one serves; the commit copies it into place.
``"journal"``: live tensors are written in place while nobody reads; their old bytes are kept on the host for an abort.
``False``: written in place, and nothing is kept: a failure leaves tensors of two versions, ``State.TORN``.
"""

Changes = Mapping[Any, object]
"""What changes in the state of a module, a tensor or a holder: new values by key, or ``attributes.ABSENT``."""


class Shown(NamedTuple):
    """What a model shows of the new version before it is committed.

    Attributes:
        live: what is live of each module whose contents were exchanged.
        show: exchanges what was delivered since, by name, in all modules but these.
    """

    live: Mapping[nn.Module, Contents]
    show: Callable[[Iterable[str], Container[nn.Module]], object]


class Strategy(Protocol):
    """Where the bytes of one update go."""

    name: Atomic
    wrote: bool
    """Whether a live tensor may have changed. Whoever writes into what ``memory_for`` gave sets it before that."""
    exclusive: bool
    """Whether live tensors change before the commit: nobody may read them from the first write on."""
    touched: bool
    """Whether memory beside the model may have been written, in which the version before is kept."""

    def memory_for(self, names: Iterable[str], partial: Iterable[str]) -> Mapping[str, torch.Tensor]:
        """Memory for tensors that are not processed, by name, to be written by the caller.

        Those of ``partial`` hold their old bytes, for not all will be written.
        """

    def lend(self, names: Iterable[str], scratch: Mirror) -> None:
        """Give scratch memory in which the values are collected anyway, as far as that has the same layout."""

    def take_back(self) -> None:
        """See that nothing else refers to what was lent, when all values are delivered."""

    def deliver(self, pairs: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the new values of live tensors, by name. The values themselves are not kept."""

    def attribute(self, holder: object, changes: Changes) -> None:
        """Take what changes in the state of a live module, tensor or holder."""

    def showing(self, model: nn.Module) -> AbstractContextManager[Shown]:
        """Inside, the model holds what was delivered before, in place of what is live; afterwards it is as before."""

    def show(self) -> int:
        """Make the model version M so that ``hide`` can take it back. Returns how many bytes this call wrote."""

    def hide(self) -> None:
        """Take back what ``show`` did, and only that. What code wrote meanwhile to new bytes, version M has."""

    def commit(self) -> int:
        """Make the model version M for good. Returns how many bytes this call wrote."""

    def abort(self) -> None:
        """Make the model version N again; where M was committed by ``show``, too."""


class InPlace:
    """Nothing is kept. A failure leaves tensors of two versions."""

    name: Atomic = False
    exclusive = True

    def __init__(self, live: Mapping[str, torch.Tensor]) -> None:
        self._live = live
        self.wrote = self.touched = False

    def memory_for(self, names: Iterable[str], partial: Iterable[str]) -> Mapping[str, torch.Tensor]:
        """The live tensors themselves."""
        names = list(names)
        self._keep(names)
        return {name: self._live[name] for name in names}

    def lend(self, names: Iterable[str], scratch: Mirror) -> None:
        """None: layers are processed beside the live tensors, and no copy of the new ones is kept."""

    def take_back(self) -> None:
        """Nothing was lent."""

    def deliver(self, pairs: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy into the live tensors."""
        for name, value in pairs:
            if _takes_bytes(name, self._live[name]):
                self._keep([name])
                self.wrote = True
                _copy(self._live[name], value)

    def attribute(self, holder: object, changes: Changes) -> None:
        """Change it in place."""
        self.wrote = True
        amend(holder, changes)

    @contextmanager
    @signals.held
    def showing(self, model: nn.Module) -> Iterator[Shown]:
        """The model holds it already."""
        yield Shown({}, lambda names, but: None)

    def show(self) -> int:
        """The model holds it already."""
        return 0

    def hide(self) -> None:
        """It stays until ``abort``."""

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
        self._saved: set[int] = set()  # numbers of spans
        self._held: list[tuple[object, dict[Any, object]]] = []

    def attribute(self, holder: object, changes: Changes) -> None:
        """Change it in place, and remember what was there."""
        self._held.append((holder, state_of(holder)))
        super().attribute(holder, changes)

    def abort(self) -> None:
        """Put everything back, the last first."""
        for holder, held in reversed(self._held):
            assign(holder, held)
        for span in self._saved:
            copy_all((self._live[name], self._mirror[name]) for name in self._mirror.layout.inside(span))

    def _keep(self, names: Iterable[str]) -> None:
        layout = self._mirror.layout
        for span in dict.fromkeys(layout.of(name) for name in names if name in layout):
            # Tensors that overlap are saved together: one by one, the second would be saved after it was written over.
            if span not in self._saved:
                self.touched = True
                for name in layout.inside(span):
                    _copy(self._mirror[name], self._live[name])
                self._saved.add(span)


class Staged:
    """The new version is collected on the host beside the live one; commit copies it, abort forgets it."""

    name: Atomic = "staged"
    exclusive = False

    def __init__(self, live: Mapping[str, torch.Tensor], mirror: Mirror) -> None:
        self._live = live
        self._mirror = mirror
        self.wrote = self.touched = False
        self._staged: dict[str, None] = {}
        self._lent: set[int] = set()  # numbers of spans that scratch lies in
        self._held: list[tuple[object, dict[Any, object]]] = []
        self._shown: dict[int, None] = {}  # numbers of spans that hold version M, while the mirror holds N
        self._before: list[tuple[object, dict[Any, object]]] = []

    def memory_for(self, names: Iterable[str], partial: Iterable[str]) -> Mapping[str, torch.Tensor]:
        """Memory beside the live tensors."""
        self.touched = True
        names = [name for name in names if name in self._mirror.layout]
        for name in set(partial).intersection(names):
            _copy(self._mirror[name], self._live[name])
        self._staged.update(dict.fromkeys(names))
        return {name: self._mirror[name] for name in names}

    def lend(self, names: Iterable[str], scratch: Mirror) -> None:
        """Give the memory of the copy: where processing leaves a value as it lies, it need not be copied there."""
        lent = set(self._mirror.lend(names, scratch))
        self.touched |= bool(lent)
        self._lent |= lent

    def take_back(self) -> None:
        """What processing made may refer to what it was given: a closure over a weight. That keeps its memory."""
        while self._lent:
            self._mirror.take_back(self._lent.pop())

    def deliver(self, pairs: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Keep copies of the values for the commit."""
        of = self._mirror.layout.of
        pairs = [(name, value) for name, value in pairs if _takes_bytes(name, self._live[name])]
        self.touched |= bool(pairs)
        self._staged.update((name, None) for name, _ in pairs)
        moved = {of(name) for name, value in pairs if not _is_same(value, self._mirror[name])}
        pairs = [(name, value) for name, value in pairs if of(name) in moved]
        # Processing may have exchanged two tensors, or transposed one where it lay.
        written = Extents(self._mirror[name] for name, _ in pairs)
        apart = [(name, value.clone() if written.meets(value) else value) for name, value in pairs]
        for name, value in apart:
            _copy(self._mirror[name], value)

    def attribute(self, holder: object, changes: Changes) -> None:
        """Remember the changes for the commit."""
        self._held.append((holder, dict(changes)))

    @contextmanager
    @signals.held
    def showing(self, model: nn.Module) -> Iterator[Shown]:
        """Put what was collected into the model's places; at the end, take it out again. It walks the whole model."""
        own = frozenset(map(id, model.modules()))
        before = {module: contents(module, own) for module in modules_held(model)}
        owners: dict[int, list[nn.Module]] = defaultdict(list)
        for module, held in before.items():
            for identity in {id(tensor) for _, tensor in held.tensors()}:
                owners[identity].append(module)

        def show(names: Iterable[str], but: Container[nn.Module]) -> None:
            shown = {id(self._live[name]): self._value(name) for name in names if name in self._staged}
            for module in {module for identity in shown for module in owners.get(identity, ()) if module not in but}:
                held = contents(module, own)
                put(
                    module,
                    held.replaced({key: shown[id(tensor)] for key, tensor in held.tensors() if id(tensor) in shown}),
                )

        try:
            show(self._staged, ())
            shown = {id(self._live[name]): self._value(name) for name in self._staged} if self._held else {}
            for holder, changes in self._held:
                if not isinstance(holder, torch.Tensor):
                    amend(
                        holder,
                        {key: exchanged("", value, lambda _, t: shown.get(id(t), t)) for key, value in changes.items()},
                    )
            yield Shown(before, show)
        finally:
            put_back(before.items())

    def _value(self, name: str) -> torch.Tensor:
        live = self._live[name]
        return dressed(self._mirror[name].to(live.device), live)

    def show(self) -> int:
        """Exchange what was collected and what is live. Goes on where it failed before."""
        nbytes = 0
        for span in dict.fromkeys(map(self._mirror.layout.of, self._staged)):
            if span not in self._shown:
                nbytes += self._exchange(span)
                self._shown[span] = None
        for holder, changes in self._held[len(self._before) :]:
            self._before.append((holder, state_of(holder)))
            amend(holder, changes)
        return nbytes

    def hide(self) -> None:
        """Exchange them again. Goes on where it failed before."""
        while self._before:
            assign(*self._before[-1])
            self._before.pop()
        while self._shown:
            self._exchange(next(reversed(self._shown)))
            self._shown.popitem()

    def _exchange(self, span: int) -> int:
        layout, names = self._mirror.layout, self._mirror.layout.inside(span)
        if len(names) == 1:
            exchange_bytes(self._live[names[0]], self._mirror[names[0]])
            return self._live[names[0]].nbytes
        # Exchanged one by one, the bytes that tensors share would be exchanged twice.
        before = Mirror(layout, host.host_copy)
        for name in names:
            host.copy_bytes(before[name], self._live[name])
        staged = [name for name in layout.names(span) if name in self._staged]
        try:
            for name in staged:
                host.copy_bytes(self._live[name], self._mirror[name])
        except BaseException:
            for name in names:
                host.copy_bytes(self._live[name], before[name])
            raise
        for name in names:
            host.copy_bytes(self._mirror[name], before[name])
        return sum(self._live[name].nbytes for name in staged)

    def commit(self) -> int:
        """Copy everything that was collected into place."""
        copy_all((self._live[name], self._mirror[name]) for name in self._staged)
        for holder, changes in self._held:
            amend(holder, changes)
        return sum(self._live[name].nbytes for name in self._staged)

    def abort(self) -> None:
        """Nothing live was written, but for what is shown."""
        self.hide()


def _copy(target: torch.Tensor, value: torch.Tensor) -> None:
    if spares_threads(target, value):
        copy_all([(target, value)])
    else:
        host.copy_bytes(target, value)


def _is_same(value: torch.Tensor, place: torch.Tensor) -> bool:
    """Whether they are the same elements of the same memory, so that there is nothing to copy."""
    return (
        (value.device, value.dtype, value.shape) == (place.device, place.dtype, place.shape)
        and (value.data_ptr(), value.stride()) == (place.data_ptr(), place.stride())
        and not (value.is_conj() or value.is_neg())
    )


def _takes_bytes(name: str, live: torch.Tensor) -> bool:
    if nn.parameter.is_lazy(live) or live.numel() == 0 or is_wrapper(live):
        # The inner tensors of a wrapper have names of their own, and are written by those.
        return False
    if not has_bytes(live):
        raise LiveModelError(f"{name}: is a {type(live).__name__}, which cannot be written in place")
    return True


def check_room(mirror: Mirror, names: Iterable[str], atomic: Atomic) -> None:
    """See that the host can hold a copy of these tensors, before the first is written.

    Raises:
        LiveModelError: it cannot.
    """
    needed, there = mirror.lacking(names), host.host_available()
    if there is not None and needed > there:
        raise LiveModelError(
            f"atomic={atomic!r} keeps a copy of the model on the host: {size(needed)} more are needed, {size(there)} "
            "are there; nothing was written. atomic=False keeps no copy"
        )
