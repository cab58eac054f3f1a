"""Assembly: layer groups from opening to closing. It gives them memory, fills that, and has the layers processed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from .. import signals
from ..errors import LiveModelError
from ..loading.execute import execute
from ..loading.fallback import fall_back
from ..loading.filling import Filling
from ..loading.report import Tally
from ..loading.verify import Verifier
from ..memory import host
from ..memory.aliases import has_bytes
from ..memory.pool import Pool
from ..plan.steps import Copy
from ..sources.contracts import Addressed, InMemory
from ..sources.state_dict import StateSource
from ..text import size
from ..timeline import Timeline
from .groups import LayerGroup, parts_of
from .job import Job
from .layers import modules_held, unmoved
from .layout import Mirror
from .lock import WriteTurn
from .open_layers import OpenLayers
from .processing import Processing
from .requests import room
from .strategy import Strategy

Own = Callable[[], torch.Tensor]


@dataclass(eq=False)
class _Open:
    """A group that is being filled, and the memory that it is filled in."""

    group: LayerGroup
    scratch: Mirror | None
    destinations: Mapping[str, torch.Tensor]
    filling: Filling | None = None  # None until its first tensor comes: who is asked for all needs none.


class Assembly:
    """The layer groups of one update, while it makes the new version out of them.

    Attributes:
        done: counts what was read and written.
        processing: processes the groups.
        todo: the groups that were never opened.
        source: where the model's own code gets what could not be planned; ``None`` where tensors come one by one.
        fallen: what it gets in that case, by name.
    """

    def __init__(self, job: Job, strategy: Strategy, layers: OpenLayers, turn: WriteTurn, timeline: Timeline) -> None:
        self.done = Tally()
        self.processing = Processing(job, strategy, timeline)
        self.todo = dict.fromkeys((job.in_place, *job.groups))
        self.source: Addressed | InMemory | None = None
        self.fallen: dict[str, torch.Tensor] = {}
        self._job, self._strategy, self._layers, self._turn, self._timeline = job, strategy, layers, turn, timeline
        self._open: dict[LayerGroup, _Open] = {}
        self._late: list[_Open] = []
        self._fell_back = False

    def in_order(self) -> list[LayerGroup]:
        """The groups that were never opened; those that are closed after the others come last."""
        return sorted(self.todo, key=self._comes_late)

    def take_apart(self) -> None:
        """Take apart what is written in place, so that what waits for nothing is not held up by what does."""
        self.todo = dict.fromkeys((*parts_of(self._job.in_place, self._job.layout), *self._job.groups))

    # Fill.

    @signals.held
    def read(self, group: LayerGroup, source: Addressed | InMemory, *, close: bool = True, **options: object) -> None:
        """Open a group and fill it from a source that can be asked. It is closed now, or when ``finish`` is called."""
        signals.deliver()
        opened = self._opened(group)
        with self._reading(group):
            execute(group.plan, source, opened.destinations, self.done, **options)  # type: ignore[arg-type]
        if close and not group.deferred:
            self._close(opened)
        else:
            self._late.append(opened)

    def prove(self, verify: Verifier, pool: Pool) -> None:
        """Prove all that was read at the first load, before any of it is processed.

        The model's own code writes checkpoint format, and what shares a source tensor it writes together: it would
        write that over layers that are processed already.
        """
        verify(self._job.plan, self._job.live, pool)

    @contextmanager
    @signals.held
    def _reading(self, group: LayerGroup) -> Iterator[None]:
        try:
            with self._timeline.event("read", group.name):
                yield
        finally:
            # Ties are proven first: that may end it unwritten.
            self._strategy.wrote |= group.in_place and self.done.writing

    def may_take(self, group: LayerGroup) -> bool:
        """Whether the group is open, or ``memory_limit`` allows to open it now."""
        return group in self._open or self._may_open(group)

    def fill(self, group: LayerGroup, name: str, tensor: torch.Tensor, own: Own) -> set[torch.device]:
        """Fill a group with one tensor. Returns the devices whose queues may still read it."""
        opened = self._opened(group)
        self._strategy.wrote |= group.in_place
        filling = self._filling(opened)
        devices = filling.take(name, tensor, own)
        if not filling.missing:
            self._complete(opened)
        return devices

    def room(self, group: LayerGroup, step: Copy) -> torch.Tensor | None:
        """The memory that the copy would fill with unchanged bytes; ``None`` if its group cannot be opened yet."""
        if not self.may_take(group):
            return None
        with self._timeline.event("open", group.name) if group not in self._open else nullcontext():
            opened = self._opened(group)
        memory = room(step, self._job.plan.manifest[step.source], opened.destinations)
        self._strategy.wrote |= group.in_place and memory is not None
        return memory

    def placed(self, group: LayerGroup, name: str) -> None:
        """Take note that the bytes of a tensor lie in the memory that ``room`` gave."""
        opened = self._open[group]
        filling = self._filling(opened)
        filling.placed(name)
        if not filling.missing:
            self._complete(opened)

    def restore(self) -> None:
        """Put initial values into tensors without a layer that nothing else writes: before what may read them."""
        names = self._job.restored.difference(*(group.names for group in self._job.groups))
        if not names:
            return
        if self._strategy.exclusive:
            self._turn.take()
        for name, memory in self._strategy.memory_for(sorted(names), ()).items():
            self._strategy.wrote = True
            host.copy_bytes(memory, self._job.initial[name])

    def finish(self) -> None:
        """Close the groups that are left, when everything has come."""
        for group in list(self.todo):  # What takes no tensor is filled and processed all the same.
            self._complete(self._opened(group))
        # In the order of a first load, whatever order they came in: one may read another.
        order = {group: number for number, group in enumerate(self._job.groups)}
        self._late.sort(key=lambda late: (late.group.deferred, order.get(late.group, -1)))
        while self._late and not self._late[0].group.deferred:
            self._close(self._late.pop(0))
        if self._late:
            with nullcontext() if self._job.first else self._turn.briefly(), self.processing.showing():
                while self._late:  # What processing replaces must not be held until the last layer.
                    self._close(self._late.pop(0))
        self._fall_back()
        self.processing.settle()
        self._strategy.take_back()

    def _filling(self, opened: _Open) -> Filling:
        if opened.filling is None:
            opened.filling = Filling(opened.group.plan, opened.destinations, self.done)
        return opened.filling

    def _complete(self, opened: _Open) -> None:
        self._strategy.wrote |= opened.group.in_place
        self._filling(opened).finish()
        opened.filling = None
        self._close_in_time(opened)

    # Open.

    def _comes_late(self, group: LayerGroup) -> bool:
        """Whether it is closed after the others: it is deferred, or the model's own code will write to it."""
        return group.deferred or bool(group.layers and self._job.plan.fallback)

    def _may_open(self, group: LayerGroup) -> bool:
        nbytes = self._counted(group)
        if self._layers.fits(nbytes):
            return True
        if not len(self._layers):
            raise LiveModelError(
                f"{group.name}: {size(nbytes)} of device memory are needed to open it, memory_limit is "
                f"{size(self._layers.limit or 0)}"
            )
        return False

    def _counted(self, group: LayerGroup) -> int:
        """Bytes of device memory that its scratch takes, as far as ``memory_limit`` counts them."""
        return 0 if self._job.first or group.deferred else group.device_nbytes(self._job.layout)

    def _opened(self, group: LayerGroup) -> _Open:
        if group in self._open:
            return self._open[group]
        self.todo.pop(group, None)
        if self._strategy.exclusive:
            self._turn.take()
        opened = self._made(group)
        for name in (*group.names, *group.touched) if not self._job.first else ():
            if name in self._job.initial:
                self._strategy.wrote |= group.in_place
                host.copy_bytes(opened.destinations[name], self._job.initial[name])
        if not group.deferred and not group.in_place:
            self._layers.open(group, (layer.name for layer in group.layers), self._counted(group))
        self._open[group] = opened
        return opened

    def _made(self, group: LayerGroup) -> _Open:
        live = {name: self._job.live[name] for name in group.touched if name in self._job.live}
        scratch: Mirror | None = None
        if self._job.first:
            memory: Mapping[str, torch.Tensor] = {}
        elif group.in_place:
            memory = self._strategy.memory_for(group.touched, self._job.partial & group.touched)
        else:
            scratch = Mirror(self._job.layout, host.scratch)
            self._strategy.lend(group.names, scratch)
            memory = {name: scratch[name] for name in group.names}
            self.done.hold_scratch(scratch.nbytes)
        return _Open(group, scratch, {**live, **memory})

    # Close.

    def _close_in_time(self, opened: _Open) -> None:
        if self._comes_late(opened.group):
            self._late.append(opened)
        else:
            self._close(opened)

    def _close(self, opened: _Open) -> None:
        group, scratch = opened.group, opened.scratch
        self._open.pop(group, None)
        if self._job.first:
            if group.layers:
                self._fall_back()
            self.processing.first(group)
        elif scratch is not None:
            with self._turn.briefly() if group.layers else nullcontext():  # Layers hold scratch then.
                self.processing.run(group, scratch, ready=self._fall_back)
            self.done.hold_scratch(-scratch.nbytes)
        self._layers.close(group)

    def _fall_back(self) -> None:
        """Let the model's own code load what could not be planned: once, when all else that it may read is there."""
        job, plan = self._job, self._job.plan
        if not plan.fallback or self._fell_back:
            return
        self._fell_back = True
        if self._strategy.exclusive:
            self._turn.take()
        self._strategy.memory_for([name for name, tensor in job.live.items() if has_bytes(tensor)], ())
        self._strategy.wrote = True
        source = self.source or StateSource(self.fallen)
        layers = {layer.module for group in job.groups for layer in group.layers}
        others = [module for module in modules_held(job.model) if module not in layers]
        with (
            Pool() as pool,
            self._timeline.event("fall back", ""),
            nullcontext() if job.first else unmoved(others),
        ):
            fall_back(plan, job.model, source, {}, self.done, by=job.by, pool=pool, advance=lambda nbytes: None)

    @signals.whole
    def forget(self) -> None:
        """Let go of open groups, and of what the model's own code would get. May be called twice."""
        for group in [*self._open, *(opened.group for opened in self._late)]:
            self._layers.close(group)
        for kept in (self.todo, self._open, self._late, self.fallen):
            kept.clear()
        self.source = None
