"""Attempt: what one update does. It takes tensors, fills and processes units in order; a way keeps what comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch

from ..errors import HotweightsError
from ..loading.execute import execute
from ..loading.fallback import fall_back
from ..loading.filling import Filling
from ..loading.report import Tally
from ..manifest import Manifest, TensorSpec
from ..memory import host
from ..memory.aliases import has_bytes
from ..memory.devices import record_events
from ..memory.pool import Pool
from ..plan.steps import Copy, Fate
from ..sources.contracts import Addressed, InMemory, Request, Source
from ..sources.state_dict import StateSource
from ..text import size
from .atomic import Strategy
from .groups import LayerGroup, parts_of
from .job import Job
from .layers import unmoved
from .layout import Mirror
from .lock import WriteTurn
from .open_layers import OpenLayers
from .processing import Processing
from .report import Timeline, UpdateReport
from .requests import requests, room

Own = Callable[[], torch.Tensor]


@dataclass(eq=False)
class _Open:
    """A unit that is being filled."""

    unit: LayerGroup
    scratch: Mirror | None
    destinations: Mapping[str, torch.Tensor]
    filling: Filling | None = None


class Attempt:
    """One attempt.

    Attributes:
        job: what it works with.
        way: where its bytes go.
        turn: its hold on the guard of readers.
        timeline: what it spent time on.
        processing: what processes its units.
        peak_buffer: bytes of the pool at peak.
    """

    def __init__(self, job: Job, way: Strategy, layers: OpenLayers, turn: WriteTurn) -> None:
        self.job, self.way, self.turn = job, way, turn
        self.timeline = Timeline(layers)
        self.processing = Processing(job, way, self.timeline)
        self.peak_buffer = 0
        self._layers = layers
        self._done = Tally()
        self._todo = dict.fromkeys((job.direct, *job.units))  # those that were never opened
        self._open: dict[LayerGroup, _Open] = {}
        self._late: list[_Open] = []
        self._waiting: dict[LayerGroup, dict[str, torch.Tensor]] = {}
        self._held = 0  # bytes of tensors that wait on the host for their layer's turn
        self._peak_held = 0
        self._arrived: set[str] = set()
        self._fallen: dict[str, torch.Tensor] = {}  # what the model's own code gets
        self._source: Addressed | InMemory | None = None
        self._fell_back = False

    @property
    def open_nbytes(self) -> int:
        """Device memory that open layers take now."""
        return self._layers.nbytes

    @property
    def manifest(self) -> Manifest:
        """What must come."""
        return self.job.plan.manifest

    @property
    def warned(self) -> bool:
        """Whether the one warning of open layers was given."""
        return self._layers.warned

    def requests(self) -> list[Request]:
        """What a source that can choose shall send, layer by layer; what waits for all others comes last."""
        _ = self._wanted  # From here on tensors come as they come.
        return requests(sorted(self._todo, key=self._comes_late), self.job.plan, self._room)

    def _room(self, unit: LayerGroup, step: Copy) -> torch.Tensor | None:
        """The memory that a copy would fill with the bytes as they are, if its layer may be opened now."""
        opened = self._open.get(unit)
        if opened is None:
            if not self._may_open(unit):
                return None
            opened = self._opened(unit)
        found = room(step, self.manifest[step.source], opened.destinations)
        self.way.wrote |= unit.direct and found is not None
        return found

    # Whole sources.

    def run(self, source: Source, *, pool: Pool, advance: Callable[[int], None], **options: object) -> None:
        """Take everything from a source: what it is asked for, layer by layer; or as it comes."""
        if not isinstance(source, (Addressed, InMemory)):
            self._stream(source, advance)
            return
        assert "_wanted" not in self.__dict__, "whose tensors come as they come is done in other parts"
        self._source = source
        self._arrived |= set(self.manifest)
        for unit in (self.job.direct, *sorted(self.job.units, key=self._comes_late)):
            # Nothing of it outlives the call: scratch of the layer before would be held beside the next one's.
            self._read(unit, source, pool=pool, advance=advance, **options)

    def _read(self, unit: LayerGroup, source: Source, **options: object) -> None:
        opened = self._opened(unit)
        with self._reading(unit):
            execute(unit.plan, source, opened.destinations, self._done, **options)  # type: ignore[arg-type]
        self._close(opened)

    @contextmanager
    def _reading(self, unit: LayerGroup) -> Iterator[None]:
        try:
            with self.timeline.event("read", unit.name):
                yield
        finally:
            self.way.wrote |= unit.direct and self._done.writing  # Ties are proven first: that may end it unwritten.

    def _stream(self, source: Source, advance: Callable[[int], None]) -> None:
        with source.leases() as stream:
            for lease in stream:
                if lease.placed:
                    self._placed(lease.name, lease.raw.nbytes)
                    advance(lease.raw.nbytes)
                    continue
                devices = self.take(lease.name, lease.tensor, lease.own)
                advance(lease.spec.nbytes)
                lease.release(after=record_events(devices))

    # Tensors that come.

    @cached_property
    def _wanted(self) -> dict[str, list[LayerGroup]]:
        """Which units want each tensor. What waits for nothing is not held up by what does."""
        self._todo = dict.fromkeys((*parts_of(self.job.direct, self.job.spans), *self.job.units))
        found: dict[str, list[LayerGroup]] = {}
        for unit in self._todo:
            for name in unit.sources:
                found.setdefault(name, []).append(unit)
        return found

    def check_apart(self, name: str, tensor: torch.Tensor) -> None:
        """Refuse what lies in the model's own memory where that is written meanwhile: it may hold version M by now."""
        if self.way.exclusive and has_bytes(tensor) and tensor.untyped_storage().data_ptr() in self._own:
            raise HotweightsError(
                f"{name}: lies in the model's own memory, which is written in place; feed a copy, or use "
                'atomic="staged" or update()'
            )

    @cached_property
    def _own(self) -> set[int]:
        return {one.untyped_storage().data_ptr() for one in self.job.live.values() if has_bytes(one)}

    def take(self, name: str, tensor: torch.Tensor, own: Own) -> set[torch.device]:
        """Take one tensor; it is borrowed. Returns the devices whose queues may still read it."""
        spec = self.manifest.get(name)
        if spec is None:
            raise HotweightsError(f"{name}: unexpected; it was not promised")
        _check_kept(spec, tensor)
        self._arrive(name, spec.nbytes)
        if name in self.job.plan.fallback:
            self._fallen[name] = own()
        devices: set[torch.device] = set()
        for unit in self._wanted.get(name, ()):
            opened = self._open.get(unit)
            if opened is None and not self._may_open(unit):
                self._hold(unit, name, tensor)
                continue
            devices |= self._fill(opened or self._opened(unit), name, tensor, own)
        self._drain()
        return devices

    def _arrive(self, name: str, nbytes: int) -> None:
        if name in self._arrived:
            raise HotweightsError(f"{name}: came twice")
        self._arrived.add(name)
        self._done.count({"memory": nbytes})
        self._done.arrive(nbytes)

    def _placed(self, name: str, nbytes: int) -> None:
        """A tensor came whose bytes lie in the room that its request gave."""
        self._arrive(name, nbytes)
        (unit,) = self._wanted[name]
        opened = self._open[unit]
        filling = self._filling(opened)
        filling.placed(name)
        if not filling.missing:
            self._complete(opened)
        self._drain()

    def _fill(self, opened: _Open, name: str, tensor: torch.Tensor, own: Own) -> set[torch.device]:
        filling = self._filling(opened)
        self.way.wrote |= opened.unit.direct
        devices = filling.take(name, tensor, own)
        if not filling.missing:
            self._complete(opened)
        return devices

    def _filling(self, opened: _Open) -> Filling:
        if opened.filling is None:
            opened.filling = Filling(opened.unit.plan, opened.destinations, self._done)
        return opened.filling

    def _complete(self, opened: _Open) -> None:
        self.way.wrote |= opened.unit.direct
        self._filling(opened).finish()
        opened.filling = None
        self._close_in_time(opened)

    def _hold(self, unit: LayerGroup, name: str, tensor: torch.Tensor) -> None:
        """Keep it on the host until its layer's turn."""
        there = host.host_available()
        if there is not None and tensor.nbytes > there:
            raise HotweightsError(f"{name}: waits for memory_limit, and the host has {size(there)} left")
        held = torch.empty_like(tensor, device="cpu").copy_(tensor)
        self._waiting.setdefault(unit, {})[name] = held
        self._held += held.nbytes
        self._peak_held = max(self._peak_held, self._held)

    def _drain(self) -> None:
        """Open what waits, as far as it fits."""
        while (unit := next(filter(self._may_open, self._waiting), None)) is not None:
            opened = self._opened(unit)
            tensors = self._waiting.pop(unit)
            for name in list(tensors):
                held = tensors.pop(name)
                self._held -= held.nbytes
                self._fill(opened, name, held, held.clone)

    def finish(self) -> None:
        """See that everything came, and finish what waited."""
        needed = self._wanted.keys() if self._source is None else set()
        missing = sorted((needed | set(self.job.plan.fallback)) - self._arrived)
        if missing:
            shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
            raise HotweightsError(f"{len(missing)} tensors were promised and did not come: {shown}")
        for unit in list(self._todo):  # What takes no tensor is filled and processed all the same.
            self._complete(self._opened(unit))
        for opened in sorted(self._late, key=lambda one: one.unit.deferred):
            self._close(opened)
        self._late.clear()
        self._fall_back()
        self.processing.settle()

    # Units.

    def _comes_late(self, unit: LayerGroup) -> bool:
        """Deferred ones, and those that the model's own code will write to when all else is done."""
        return unit.deferred or bool(unit.layers and self.job.plan.fallback)

    def _may_open(self, unit: LayerGroup) -> bool:
        nbytes = self._counted(unit)
        if self._layers.fits(nbytes):
            return True
        if not len(self._layers):
            raise HotweightsError(
                f"{unit.name}: {size(nbytes)} of device memory are needed to open it, memory_limit is "
                f"{size(self._layers.limit or 0)}"
            )
        return False

    def _counted(self, unit: LayerGroup) -> int:
        """Bytes of device memory that it takes, as far as they count."""
        return 0 if self.job.first or unit.deferred else unit.device_nbytes(self.job.spans)

    def _opened(self, unit: LayerGroup) -> _Open:
        self._todo.pop(unit, None)
        if self.way.exclusive:
            self.turn.take()
        opened = self._made(unit)
        for name in (*unit.names, *unit.touched) if not self.job.first else ():
            if name in self.job.initial:
                self.way.wrote |= unit.direct
                host.copy_bytes(opened.destinations[name], self.job.initial[name])
        if not unit.deferred and not unit.direct:
            self._layers.open(unit, (layer.name for layer in unit.layers), self._counted(unit))
        self._open[unit] = opened
        return opened

    def _made(self, unit: LayerGroup) -> _Open:
        live = {name: self.job.live[name] for name in unit.touched if name in self.job.live}
        if self.job.first:
            return _Open(unit, None, live)
        if unit.direct:
            return _Open(unit, None, {**live, **self.way.direct(unit.touched, self.job.partial & unit.touched)})
        scratch = Mirror(self.job.spans, host.scratch)
        inside = {name: scratch[name] for name in unit.names}
        self._done.hold_scratch(scratch.nbytes)
        return _Open(unit, scratch, {**live, **inside})

    def _close_in_time(self, opened: _Open) -> None:
        if self._comes_late(opened.unit):
            self._late.append(opened)
        else:
            self._close(opened)

    def _close(self, opened: _Open) -> None:
        unit, scratch = opened.unit, opened.scratch
        self._open.pop(unit, None)
        if self.job.first:
            if unit.layers:
                self._fall_back()
            self.processing.first(unit)
        elif scratch is not None:
            with self.turn.briefly() if unit.layers else nullcontext():  # Layers hold scratch then.
                self.processing.run(unit, scratch, ready=self._fall_back)
            self._done.hold_scratch(-scratch.nbytes)
        self._layers.close(unit)

    def _fall_back(self) -> None:
        """Let the model's own code load what could not be planned, once, when all else that it may need is there."""
        plan = self.job.plan
        if not plan.fallback or self._fell_back:
            return
        self._fell_back = True
        if self.way.exclusive:
            self.turn.take()
        self.way.direct([name for name, one in self.job.live.items() if has_bytes(one)], ())
        self.way.wrote = True
        source = self._source or StateSource(self._fallen)
        layers = {layer.module for unit in self.job.units for layer in unit.layers}
        others = [module for module in self.job.model.modules() if module not in layers]
        with (
            Pool() as pool,
            self.timeline.event("fall back", ""),
            nullcontext() if self.job.first else unmoved(others),
        ):
            fall_back(plan, self.job.model, source, {}, self._done, pool=pool, advance=lambda nbytes: None)

    # Its end.

    def forget(self) -> None:
        """Let go of everything that is open or waits, and of readers."""
        for unit in [*self._open, *(opened.unit for opened in self._late)]:
            self._layers.close(unit)
        for kept in (self._todo, self._open, self._late, self._waiting, self._fallen):
            kept.clear()
        self._source = None
        self.turn.give_back()

    def report(self, previous: str | int | None, version: str | int, written: int, copied: int) -> UpdateReport:
        """What it did, to make a version that is live; its commit wrote ``written`` bytes, ``copied`` are kept."""
        plan, done = self.job.plan, self._done
        used = [name for name, fate in plan.fates.items() if fate in (Fate.WRITTEN, Fate.CAST, Fate.TIED)]
        return UpdateReport(
            version=version,
            previous=previous,
            atomic=None if self.job.first else self.way.name,
            bytes_read=done.bytes_read,
            bytes_written=done.bytes_written + written,
            seconds=time.perf_counter() - self.timeline.began,
            stall_seconds=self.turn.seconds,
            peak_buffer_bytes=self.peak_buffer,
            peak_scratch_bytes=done.peak_scratch,
            peak_host_bytes=self._peak_held,
            copy_bytes=copied,
            open_layers=self._layers.peak_layers,
            open_bytes=self._layers.peak_nbytes,
            tensors={fate: plan.names(fate) for fate in Fate},
            planned=sum(name not in plan.fallback for name in used),
            fell_back=tuple(map(str, plan.graph_breaks)),
            replaced=tuple(self.processing.replaced),
            bytes_by_io=dict(done.bytes_by_io),
            warnings=(self._layers.warning,) if self._layers.warning else (),
            events=tuple(self.timeline.events),
        )


def _check_kept(spec: TensorSpec, tensor: torch.Tensor) -> None:
    if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
        raise HotweightsError(
            f"{spec.name}: {spec.dtype} {list(spec.shape)} was promised, {tensor.dtype} {list(tensor.shape)} came"
        )
