"""Update: one attempt to take a live model from version N to M. It fills and processes units; a way keeps them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import torch
from torch import nn

from ..devices import record_event, record_events
from ..errors import HotweightsError, UsageError
from ..execute import Execution, Filling, execute, writing_to
from ..fallback import fall_back
from ..manifest import Manifest, TensorSpec
from ..memory import Pool, host_empty
from ..plan import Fate, LoadPlan
from ..report import size
from ..sources.contracts import Addressed, InMemory, Source
from ..sources.state import StateSource
from .accounting import OpenLayers
from .layers import contents, differences, put
from .report import Event, UpdateReport
from .serving import Serving
from .spans import Mirror, Spans, has_bytes
from .units import Unit
from .ways import Way

__all__ = ["Job", "Update"]


class Owner(Protocol):
    """What an update asks of the live model that it belongs to."""

    def failing(self, update: Update) -> AbstractContextManager[None]:
        """Any failure inside aborts the update, and is told as such."""

    def prove(self) -> None:
        """See that every live tensor is where it was."""

    def prepared(self, update: Update) -> None:
        """It may be committed now."""

    def showing(self, way: Way) -> AbstractContextManager[None]:
        """The model shows what it will hold."""

    def commit(self, update: Update, version: str | int | None) -> UpdateReport:
        """Make it version M."""

    def abort(self, update: Update) -> None:
        """Make it version N again."""


@dataclass(frozen=True)
class Job:
    """What an update works with.

    Attributes:
        model: the model.
        process: processes one layer.
        plan: the whole plan.
        direct: what is written where it lies.
        units: the others.
        spans: of the checkpoint format; scratch is laid out like it.
        initial: values from before the first load that units begin with, by name, on the host.
        live: every live tensor by name.
        partial: those of which the plan writes not all bytes.
    """

    model: nn.Module
    process: Callable[[nn.Module], object]
    plan: LoadPlan
    direct: Unit
    units: list[Unit]
    spans: Spans
    initial: Mapping[str, torch.Tensor]
    live: Mapping[str, torch.Tensor]
    partial: frozenset[str]


@dataclass(eq=False)
class _Open:
    """A unit whose scratch is open."""

    unit: Unit
    scratch: Mirror | None
    destinations: Mapping[str, torch.Tensor]
    filling: Filling | None = None


class Update:
    """One attempt. A context manager; leaving it without ``commit`` aborts. Made by ``LiveModel.begin``.

    ``feed`` any number of times, then ``prepare``, then ``commit``. Until then version N is live, byte for byte: with
    ``atomic="staged"`` it serves on, with ``"journal"`` it is written over and every failure puts it back. All methods
    but ``abort`` raise ``UpdateAborted`` when something fails, and the update is over.
    """

    def __init__(self, owner: Owner, job: Job, way: Way, layers: OpenLayers, serving: Serving, *, first: bool) -> None:
        self._owner = owner
        self._serving = serving
        self._job = job
        self.way = way
        self._layers = layers
        self.first = first  # The model itself is in checkpoint format: its own tensors are filled.
        self._began = time.perf_counter()
        self._done = Execution()
        self._events: list[Event] = []
        self._exclusive = False
        self._exclusive_since = 0.0
        self._stall = 0.0
        self._read: dict[str, int] = {}
        self._open: dict[str, _Open] = {}
        self._deferred: list[_Open] = []
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}  # by unit
        self._fallen: dict[str, torch.Tensor] = {}  # what the model's own code gets
        self._source: Addressed | InMemory | None = None
        self._fell_back = False
        self._held = 0  # bytes of tensors that wait on the host for their layer's turn
        self._peak_held = 0
        self._arrived: set[str] = set()
        self._units: dict[str, list[Unit]] = {}
        for unit in (job.direct, *job.units):
            for name in unit.sources:
                self._units.setdefault(name, []).append(unit)
        self.peak_buffer = 0
        """Bytes of the pool at peak."""
        self.written = 0
        """Bytes that the commit wrote."""
        self.over = False
        """Whether it has committed or aborted."""
        self.prepared = False
        """Whether everything is there, processed and proven."""

    @property
    def manifest(self) -> Manifest:
        """What it must be fed: names, dtypes and shapes."""
        return self._job.plan.manifest

    # What users call.

    def feed(self, pairs: Iterable[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor]) -> None:
        """Take tensors, in any order and any number of calls. They may be borrowed: nothing is kept but by copy.

        A tensor is read until the iterator is advanced, on a device until its queue is done.

        Raises:
            UpdateAborted: a tensor is unknown, of another dtype or shape than promised, or comes twice; or the iterator
                raised.
        """
        self._check("feed")
        items = pairs.items() if isinstance(pairs, Mapping) else pairs
        with self._owner.failing(self):
            for name, tensor in items:
                devices = self._take(name, tensor, tensor.clone)
                _wait_for(devices | {tensor.device})  # Behind the next tensor this one may be written over.

    def prepare(self) -> None:
        """See that everything came, finish what waited, prove addresses and aliases. Version N is still live.

        Raises:
            UpdateAborted: something is missing, or was moved.
        """
        self._check("prepare")
        with self._owner.failing(self), self._event("prepare", ""):
            missing = sorted(self._units.keys() - self._arrived | (set(self._job.plan.fallback) - self._arrived))
            if missing:
                shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
                raise HotweightsError(f"{len(missing)} tensors were promised and did not come: {shown}")
            self._drain()
            for opened in self._deferred:
                self._close(opened)
            self._deferred.clear()
            self._fall_back()
            self._owner.prove()
        self.prepared = True
        self._owner.prepared(self)

    def commit(self, version: str | int | None = None) -> UpdateReport:
        """Make it version M. Nothing can fail but the hooks, and they run after it.

        Args:
            version: its name; by default the number of commits.

        Raises:
            CommitHookError: version M is live, and a hook failed.
        """
        self._check("commit")
        if not self.prepared:
            self.prepare()
        return self._owner.commit(self, version)

    def abort(self) -> None:
        """Make it version N again, whatever was fed. May be called twice."""
        if not self.over:
            self._owner.abort(self)

    def __enter__(self) -> Update:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    # Whole sources.

    def run(
        self,
        source: Source,
        *,
        pool: Pool,
        advance: Callable[[int], None] = lambda nbytes: None,
        **reading: object,
    ) -> None:
        """Take everything from a source: what it is asked for, layer by layer; or as it comes."""
        self._check("run")
        with self._owner.failing(self):
            if not isinstance(source, (Addressed, InMemory)):
                self._run_ordered(source, advance)
                return
            self._source = source
            for unit in (self._job.direct, *sorted(self._job.units, key=self._comes_late)):
                opened = self._opened(unit)
                with self._event("read", unit.name):
                    execute(unit.plan, source, opened.destinations, self._done, pool=pool, advance=advance, **reading)  # type: ignore[arg-type]
                self._deferred.append(opened) if self._comes_late(unit) else self._close(opened)
            self._arrived |= set(self.manifest)

    def _run_ordered(self, source: Source, advance: Callable[[int], None]) -> None:
        with source.leases() as stream:
            for lease in stream:
                devices = self._take(lease.name, lease.tensor, lease.own)
                advance(lease.spec.nbytes)
                lease.release(after=record_events(devices))

    # Tensors that come.

    def _take(self, name: str, tensor: torch.Tensor, own: Callable[[], torch.Tensor]) -> set[torch.device]:
        spec = self.manifest.get(name)
        if spec is None:
            raise HotweightsError(f"{name}: unexpected; it was not promised")
        _check_kept(spec, tensor)
        if name in self._arrived:
            raise HotweightsError(f"{name}: came twice")
        self._arrived.add(name)
        self._done.count({"memory": spec.nbytes})
        self._done.arrive(spec.nbytes)
        if name in self._job.plan.fallback:
            self._fallen[name] = own()
        devices: set[torch.device] = set()
        for unit in self._units.get(name, ()):
            opened = self._open.get(unit.name)
            if opened is None and not self._may_open(unit):
                self._hold(unit, name, tensor)
                continue
            devices |= self._fill(opened or self._opened(unit), name, tensor, own)
        return devices

    def _fill(
        self, opened: _Open, name: str, tensor: torch.Tensor, own: Callable[[], torch.Tensor]
    ) -> set[torch.device]:
        if opened.filling is None:
            opened.filling = Filling(opened.unit.plan, opened.destinations, self._done)
        with writing_to(opened.destinations):
            devices = opened.filling.take(name, tensor, own)
        if not opened.filling.missing:
            self._complete(opened)
        return devices

    def _complete(self, opened: _Open) -> None:
        assert opened.filling is not None
        with writing_to(opened.destinations):
            opened.filling.finish()
        opened.filling = None
        if self._comes_late(opened.unit):
            self._deferred.append(opened)
            return
        self._close(opened)
        self._drain()

    def _comes_late(self, unit: Unit) -> bool:
        """Deferred ones, and those that the model's own code will write to when all else is done."""
        return unit.deferred or bool(unit.layers and self._job.plan.fallback)

    def _may_open(self, unit: Unit) -> bool:
        nbytes = 0 if unit.deferred else unit.device_nbytes(self._job.spans)
        if self._layers.fits(nbytes):
            return True
        if not len(self._layers):
            raise HotweightsError(
                f"{unit.name}: {size(nbytes)} of device memory are needed to open it, memory_limit is "
                f"{size(self._layers.limit or 0)}"
            )
        return False

    def _hold(self, unit: Unit, name: str, tensor: torch.Tensor) -> None:
        """Keep it on the host until its layer's turn."""
        held = torch.empty_like(tensor, device="cpu").copy_(tensor)
        self._waiting.setdefault(unit.name, {})[name] = held
        self._held += held.nbytes
        self._peak_held = max(self._peak_held, self._held)

    def _drain(self) -> None:
        """Open what waits, as far as it fits."""
        by_name = {unit.name: unit for unit in self._job.units}
        for unit_name in list(self._waiting):
            if unit_name not in self._waiting or not self._may_open(by_name[unit_name]):
                continue
            tensors = self._waiting.pop(unit_name)
            opened = self._opened(by_name[unit_name])
            for name in list(tensors):
                held = tensors.pop(name)
                self._held -= held.nbytes
                self._fill(opened, name, held, held.clone)

    # Units.

    def _opened(self, unit: Unit) -> _Open:
        self._begin_writing()
        initial = [name for name in (*unit.names, *unit.touched) if name in self._job.initial]
        if self.first:
            opened = _Open(unit, None, {name: self._job.live[name] for name in unit.touched})
        elif unit is self._job.direct:
            full = set(unit.touched) - self._job.partial
            destinations = self.way.direct(unit.touched, unit.touched - full)
            opened = _Open(unit, None, {**{name: self._job.live[name] for name in unit.touched}, **destinations})
        else:
            scratch = Mirror(self._job.spans, _scratch)
            inside = {name: scratch[name] for name in unit.names if name in self._job.spans}
            opened = _Open(unit, scratch, {**{name: self._job.live[name] for name in unit.touched}, **inside})
            self._done.hold_scratch(scratch.nbytes)
        for name in () if self.first else initial:
            target = opened.destinations[name]
            with torch.no_grad():
                target.detach().copy_(self._job.initial[name])
        if not unit.deferred and unit is not self._job.direct:
            nbytes = 0 if self.first else unit.device_nbytes(self._job.spans)
            self._layers.open(unit.name, (layer.name for layer in unit.layers), nbytes)
        self._open[unit.name] = opened
        return opened

    def _close(self, opened: _Open) -> None:
        unit = opened.unit
        self._open.pop(unit.name, None)
        if self.first:
            if self._comes_late(unit):
                self._fall_back()
            for layer in unit.layers:
                with self._event("process", layer.name), torch.no_grad():
                    self._job.process(layer.module)
        elif unit is not self._job.direct:
            self._process(opened)
        self._layers.close(unit.name)
        if opened.scratch is not None:
            self._done.hold_scratch(-opened.scratch.nbytes)

    def _process(self, opened: _Open) -> None:
        """Process the layers of a unit in their scratch, and hand over what came of it."""
        unit, scratch = opened.unit, opened.scratch
        assert scratch is not None
        with self._swapped(unit):
            before = [contents(layer.module) for layer in unit.layers]
            made = []
            try:
                for layer in unit.layers:
                    layer.open(scratch.__getitem__)
                self._fall_back()
                for layer in unit.layers:
                    with self._event("process", layer.name), torch.no_grad():
                        self._job.process(layer.module)
                made = [contents(layer.module) for layer in unit.layers]
            finally:
                for layer, held in zip(unit.layers, before, strict=True):
                    put(layer.module, held)
        with self._event("write", unit.name):
            for layer, old, new in zip(unit.layers, before, made, strict=True):
                found = differences(layer, old, new)
                for name, value in found.values:
                    self.way.deliver(name, value)
                self.way.attribute(layer.module, old._replace(attributes={**old.attributes, **found.attributes}))
            for name in unit.loose:
                self.way.deliver(name, scratch[name])

    @contextmanager
    def _swapped(self, unit: Unit) -> Iterator[None]:
        """Nobody reads the model while layers hold scratch. Deferred ones see all others as they will be."""
        began = time.perf_counter()
        if not self._exclusive:
            self._serving.begin_writing()
        try:
            if unit.deferred and not self.way.exclusive:
                with self._owner.showing(self.way):
                    yield
            else:
                yield
        finally:
            if not self._exclusive:
                self._serving.end_writing()
                self._stall += time.perf_counter() - began

    def _fall_back(self) -> None:
        """Let the model's own code load what could not be planned, once, when all else that it may need is there."""
        plan = self._job.plan
        if not plan.fallback or self._fell_back:
            return
        self._fell_back = True
        self._begin_writing()
        self.way.direct([name for name, one in self._job.live.items() if has_bytes(one)], ())
        source = self._source or StateSource(self._fallen)
        with Pool() as pool, self._event("fall back", ""):
            fall_back(plan, self._job.model, source, {}, self._done, pool=pool, advance=lambda nbytes: None)

    def _begin_writing(self) -> None:
        if self.way.exclusive and not self._exclusive:
            self._serving.begin_writing()
            self._exclusive = True
            self._exclusive_since = time.perf_counter()

    # What the live model calls.

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Nobody reads the model inside; afterwards the update is over."""
        with self._alone(), self._event("commit", ""):
            yield
        self.over = True
        self._forget()

    @contextmanager
    def aborting(self) -> Iterator[None]:
        """Nobody reads the model inside; afterwards the update is over, whatever happens."""
        try:
            with self._alone():
                yield
        finally:
            self.over = True
            self._forget()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._exclusive:
            self._serving.begin_writing()
            self._exclusive, self._exclusive_since = True, time.perf_counter()
        try:
            yield
        finally:
            self._exclusive = False
            self._stall += time.perf_counter() - self._exclusive_since
            self._serving.end_writing()

    def _forget(self) -> None:
        for opened in [*self._open.values(), *self._deferred]:
            self._layers.close(opened.unit.name)
        for kept in (self._open, self._deferred, self._waiting, self._fallen):
            kept.clear()
        self._source = None

    @property
    def warned(self) -> bool:
        """Whether the one warning of open layers was given."""
        return self._layers.warned

    def report(self, previous: str | int | None, version: str | int, copy_nbytes: int) -> UpdateReport:
        """What it did."""
        plan, done = self._job.plan, self._done
        used = [name for name, fate in plan.fates.items() if fate in (Fate.WRITTEN, Fate.CAST, Fate.TIED)]
        return UpdateReport(
            version=version,
            previous=previous,
            atomic=None if self.first else self.way.name,
            bytes_read=done.bytes_read,
            bytes_written=done.bytes_written + self.written,
            seconds=time.perf_counter() - self._began,
            stall_seconds=self._stall,
            peak_buffer_bytes=self.peak_buffer,
            peak_scratch_bytes=done.peak_scratch,
            peak_host_bytes=self._peak_held,
            copy_bytes=copy_nbytes,
            open_layers=self._layers.peak_layers,
            open_bytes=self._layers.peak_nbytes,
            tensors={fate: plan.names(fate) for fate in Fate},
            planned=sum(name not in plan.fallback for name in used),
            fell_back=tuple(map(str, plan.notes)),
            roads=dict(done.roads),
            warnings=(*plan.warnings, *((self._layers.warning,) if self._layers.warning else ())),
            events=tuple(self._events),
        )

    # Odds and ends.

    def _check(self, verb: str) -> None:
        if self.over:
            raise UsageError(f"this update is over; it cannot {verb}")
        if self.prepared and verb in ("feed", "run"):
            raise UsageError(f"this update is prepared; it cannot {verb} any more")

    @contextmanager
    def _event(self, what: str, of: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._events.append(
                Event(what, of, began - self._began, time.perf_counter() - self._began, self._layers.nbytes)
            )


def _check_kept(spec: TensorSpec, tensor: torch.Tensor) -> None:
    if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
        raise HotweightsError(
            f"{spec.name}: {spec.dtype} {list(spec.shape)} was promised, {tensor.dtype} {list(tensor.shape)} came"
        )


def _wait_for(devices: set[torch.device]) -> None:
    for device in devices:
        event = record_event(device)
        if isinstance(event, torch.Event):
            event.synchronize()


def _scratch(nbytes: int, device: torch.device) -> torch.Tensor:
    return (
        host_empty((nbytes,), torch.uint8)
        if device.type == "cpu"
        else torch.empty(nbytes, dtype=torch.uint8, device=device)
    )
