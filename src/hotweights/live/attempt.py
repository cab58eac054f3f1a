"""Attempt: the work of one update. It takes tensors, fills groups of layers with them, and has those processed."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch

from .. import signals
from ..dtypes import DType, format_name, may_cast
from ..errors import LiveModelError, SourceError
from ..loading.apart import held_apart
from ..loading.execute import execute
from ..loading.fallback import fall_back
from ..loading.filling import Filling
from ..loading.report import Tally
from ..loading.requests import bytes_to_read, request_nbytes
from ..loading.verify import Verifier
from ..manifest import Manifest, TensorSpec
from ..memory import host
from ..memory.aliases import has_bytes
from ..memory.devices import record_events
from ..memory.extents import Extents
from ..memory.pool import Pool
from ..model.reachable import reachable
from ..plan.steps import Copy, Fate, Program, Step
from ..sources.contracts import Addressed, InMemory, Request, Source
from ..sources.state_dict import StateSource
from ..text import size, some
from ..timeline import Timeline
from .fed_names import FedNames
from .groups import LayerGroup, parts_of
from .job import Job
from .layers import modules_held, unmoved
from .layout import Mirror
from .lock import WriteTurn
from .open_layers import OpenLayers
from .processing import Processing
from .report import UpdateReport
from .requests import requests, room
from .strategy import Strategy

Own = Callable[[], torch.Tensor]


@dataclass(eq=False)
class _Open:
    """A group that is being filled, and the memory that it is filled in."""

    group: LayerGroup
    scratch: Mirror | None
    destinations: Mapping[str, torch.Tensor]
    filling: Filling | None = None


class Attempt:
    """One attempt.

    Attributes:
        job: what there is to do.
        strategy: where the bytes go until the commit.
        turn: the update's hold on the lock that keeps readers out.
        timeline: what the time was spent on.
        processing: processes the groups.
        peak_buffer: bytes of the pool at peak.
    """

    def __init__(self, job: Job, strategy: Strategy, layers: OpenLayers, turn: WriteTurn, fed: FedNames) -> None:
        self.job, self.strategy, self.turn = job, strategy, turn
        self._fed = fed
        self.timeline = Timeline(lambda: layers.nbytes)
        self.processing = Processing(job, strategy, self.timeline)
        self.peak_buffer = 0
        self._layers = layers
        self._done = Tally()
        self._todo = dict.fromkeys((job.in_place, *job.groups))  # those that were never opened
        self._takers: dict[str, list[LayerGroup]] | None = None  # by tensor, from ``take_as_it_comes`` on
        self._open: dict[LayerGroup, _Open] = {}
        self._late: list[_Open] = []
        self._waiting: dict[LayerGroup, dict[str, torch.Tensor]] = {}
        self._held = 0  # bytes of tensors that wait on the host for their layer's turn
        self._peak_held = 0
        self._arrived: set[str] = set()
        self._asked: dict[str, int] = {}  # bytes of each tensor, where the source sends what it is asked for
        self._fallen: dict[str, torch.Tensor] = {}  # what the model's own code gets
        self._source: Addressed | InMemory | None = None
        self._casts: dict[str, str] = {}  # of tensors that came in other dtypes than the plan's
        self._fell_back = False

    @property
    def open_nbytes(self) -> int:
        """Device memory that open layers take now."""
        return self._layers.nbytes

    def nbytes_to_read(self, source: Source) -> int:
        """How many bytes will come from the source: the total of a progress bar."""
        if isinstance(source, (Addressed, InMemory)):
            return sum(bytes_to_read(group.plan, source) for group in (self.job.in_place, *self.job.groups))
        return sum(self._asked.values()) if self._asked else self.manifest.nbytes

    @property
    def manifest(self) -> Manifest:
        """What must come."""
        return self.job.plan.manifest

    @property
    def warned(self) -> bool:
        """Whether the one warning of open layers was given."""
        return self._layers.warned

    def requests(self) -> list[Request]:
        """What to ask of a source that can choose: layer by layer, deferred layers last."""
        self.take_as_it_comes()
        wanted = requests(sorted(self._todo, key=self._comes_late), self.job.plan, self._room)
        self._asked = {request.name: request_nbytes(request, self.manifest) for request in wanted}
        return wanted

    def _room(self, group: LayerGroup, step: Copy) -> torch.Tensor | None:
        """The memory that the copy would fill with unchanged bytes; ``None`` if its layer cannot be opened yet."""
        opened = self._open.get(group)
        if opened is None:
            if not self._may_open(group):
                return None
            with self.timeline.event("open", group.name):
                opened = self._opened(group)
        memory = room(step, self.manifest[step.source], opened.destinations)
        self.strategy.wrote |= group.in_place and memory is not None
        return memory

    # Whole sources.

    def run(
        self,
        source: Source,
        *,
        pool: Pool,
        advance: Callable[[int], None],
        verify: Verifier | None = None,
        **options: object,
    ) -> None:
        """Take everything from a source: layer by layer where it can be asked, else as it comes."""
        if not isinstance(source, (Addressed, InMemory)):
            self.take_as_it_comes()
            self._stream(source, advance)
            return
        assert self._takers is None, "an attempt takes tensors as they come, or asks for them, not both"
        self._source = source
        self._restore()
        self._arrived |= set(self.manifest)
        for group in (self.job.in_place, *sorted(self.job.groups, key=self._comes_late)):
            # Nothing of it outlives the call: scratch of the layer before would be held beside the next one's.
            self._read(group, source, verify, pool=pool, advance=advance, **options)

    @signals.held
    def _read(
        self, group: LayerGroup, source: Source, verify: Verifier | None, *, pool: Pool, **options: object
    ) -> None:
        signals.deliver()
        opened = self._opened(group)
        with self._reading(group):
            execute(group.plan, source, opened.destinations, self._done, pool=pool, **options)  # type: ignore[arg-type]
        if verify is not None:  # Before it is processed: the model's own code makes checkpoint format.
            verify(group.plan, opened.destinations, pool)
        self._close(opened)

    @contextmanager
    @signals.held
    def _reading(self, group: LayerGroup) -> Iterator[None]:
        try:
            with self.timeline.event("read", group.name):
                yield
        finally:
            self.strategy.wrote |= (
                group.in_place and self._done.writing
            )  # Ties are proven first: that may end it unwritten.

    def _stream(self, source: Source, advance: Callable[[int], None]) -> None:
        with source.leases() as stream:
            # Staged, what is live is not written before the commit.
            leases = held_apart(stream, self._own, self._begun) if self.strategy.exclusive else stream
            for lease in leases:
                if lease.placed:
                    self._placed(lease.name, lease.raw.nbytes)
                    advance(lease.raw.nbytes)
                    continue
                with self.timeline.event("fill", lease.name):
                    devices = self.take(lease.name, lease.tensor, lease.own)
                advance(self._asked.get(lease.name, lease.spec.nbytes))
                lease.release(after=record_events(devices))
                signals.deliver()

    # Tensors that come.

    def take_as_it_comes(self) -> None:
        """Get ready for tensors in any order, before the first. May be called again.

        What is written in place is taken apart, so that what waits for nothing is not held up by what does.
        """
        if self._takers is not None:
            return
        self._todo = dict.fromkeys((*parts_of(self.job.in_place, self.job.layout), *self.job.groups))
        self._takers = {}
        for group in self._todo:
            for name in group.sources:
                self._takers.setdefault(name, []).append(group)

    def check_apart(self, name: str, tensor: torch.Tensor) -> None:
        """Refuse a tensor in the model's own memory while that is written: it may hold bytes of version M by now."""
        if self.strategy.exclusive and self._own.meets(tensor):
            raise SourceError(
                f"{name}: lies in the model's own memory, which is written in place; feed a copy, or use "
                'atomic="staged" or update()'
            )

    @cached_property
    def _own(self) -> Extents:
        tensors = (*self.job.live.values(), *reachable(self.job.model).values())
        return Extents({id(tensor): tensor for tensor in tensors}.values())

    def _begun(self) -> Extents:
        """The memory of the model that may have been written by now."""
        if self.job.first and self.processing.begun:  # Processing replaced tensors that had been written.
            return self._own
        assert self._takers is not None, "take_as_it_comes comes first"
        groups = {group for name in self._arrived for group in self._takers.get(name, ())}
        steps = (step for group in groups for step in group.plan.steps if not self._arrived.isdisjoint(step.sources))
        names = {name for step in steps for name in step.destinations}
        for group in groups:
            names |= {name for name in group.touched if name in self.job.initial}
            names.update(group.names, *(layer.tensors() for layer in group.layers))
        return Extents(self.job.live[name] for name in names if name in self.job.live)

    def take(self, name: str, tensor: torch.Tensor, own: Own) -> set[torch.device]:
        """Take one tensor; it is borrowed. Returns the devices whose queues may still read it."""
        spec = self._promised(name)
        tensor, own = self._as_planned(spec, tensor, own)
        self._arrive(name, self._asked.get(name, spec.nbytes))
        if name in self.job.plan.fallback:
            self._fallen[name] = own()
        devices: set[torch.device] = set()
        for group in self._takers_of(name):
            opened = self._open.get(group)
            if opened is None and not self._may_open(group):
                self._hold(group, name, tensor)
                continue
            devices |= self._fill(opened or self._opened(group), name, tensor, own)
        self._drain()
        return devices

    def _promised(self, name: str) -> TensorSpec:
        spec = self.manifest.get(name)
        if spec is not None:
            return spec
        similar = difflib.get_close_matches(name, list(self.manifest), cutoff=0.4)
        near = f"near it are {some(similar)}" if similar else f"it has {some(list(self.manifest), 3)}"
        raise SourceError(
            f"{name}: unexpected; the manifest of this update has no such name, {near}. For other names than those of "
            "the live version, give begin(manifest) what will come: hw.open(tensors).manifest"
        )

    def _as_planned(self, spec: TensorSpec, tensor: torch.Tensor, own: Own) -> tuple[torch.Tensor, Own]:
        """The tensor in a dtype that the plan can take, where it came in another one and nobody promised its dtype."""
        cast = self.job.cast
        if tensor.dtype == spec.dtype or cast is None or tuple(tensor.shape) != spec.shape:
            _check_kept(spec, tensor)
            return tensor, own
        assert isinstance(spec.dtype, torch.dtype)
        change = f"{format_name(tensor.dtype)} -> {format_name(spec.dtype)}"
        steps = [step for group in self._takers_of(spec.name) for step in group.plan.steps if spec.name in step.sources]
        into = {self._dtype_written(step) for step in steps}
        # In between, a float of fewer bits would lose what the model's own could hold, and code may treat dtypes apart.
        if spec.name in self.job.plan.fallback or not into <= {spec.dtype} or not tensor.dtype.is_floating_point:
            raise SourceError(
                f"{spec.name}: {change}: the plan is made for the dtypes of the live version; give begin(manifest) "
                "what will come: hw.open(tensors).manifest"
            )
        if not may_cast(tensor.dtype, spec.dtype, cast):
            raise SourceError(f'{spec.name}: {change} loses information; begin(cast="loader") allows it')
        self._casts[spec.name] = change
        made = tensor.to(spec.dtype)
        return made, lambda: made

    def _takers_of(self, name: str) -> list[LayerGroup]:
        assert self._takers is not None, "take_as_it_comes comes first"
        return self._takers.get(name, [])

    def _dtype_written(self, step: Step) -> DType | None:
        """The dtype of what a copy writes; ``None`` for a program."""
        if isinstance(step, Program):
            return None
        if step.into is not None:
            return step.into.dtype
        target = self.job.plan.targets.get(step.destination)
        return None if target is None else target.spec.dtype

    def _arrive(self, name: str, nbytes: int) -> None:
        if name in self._arrived:
            raise SourceError(f"{name}: came twice")
        self._arrived.add(name)
        self._done.count({"memory": nbytes})
        self._done.arrive(nbytes)

    def _placed(self, name: str, nbytes: int) -> None:
        """A tensor came, and its bytes lie already in the memory that the request gave."""
        self._arrive(name, nbytes)
        assert self._takers is not None, "take_as_it_comes comes first"
        (group,) = self._takers[name]
        opened = self._open[group]
        filling = self._filling(opened)
        filling.placed(name)
        if not filling.missing:
            self._complete(opened)
        self._drain()

    def _fill(self, opened: _Open, name: str, tensor: torch.Tensor, own: Own) -> set[torch.device]:
        filling = self._filling(opened)
        self.strategy.wrote |= opened.group.in_place
        devices = filling.take(name, tensor, own)
        if not filling.missing:
            self._complete(opened)
        return devices

    def _filling(self, opened: _Open) -> Filling:
        if opened.filling is None:
            opened.filling = Filling(opened.group.plan, opened.destinations, self._done)
        return opened.filling

    def _complete(self, opened: _Open) -> None:
        self.strategy.wrote |= opened.group.in_place
        self._filling(opened).finish()
        opened.filling = None
        self._close_in_time(opened)

    def _hold(self, group: LayerGroup, name: str, tensor: torch.Tensor) -> None:
        """Keep a copy of the tensor on the host until its layer can be opened."""
        there = host.host_available()
        if there is not None and tensor.nbytes > there:
            raise LiveModelError(
                f"{name}: must wait on the host for memory_limit, and takes {size(tensor.nbytes)}; the host has "
                f"{size(there)} left"
            )
        held = torch.empty_like(tensor, device="cpu").copy_(tensor)
        self._waiting.setdefault(group, {})[name] = held
        self._held += held.nbytes
        self._peak_held = max(self._peak_held, self._held)

    def _drain(self) -> None:
        """Open the groups that wait, as far as memory allows, and give them the tensors that were held."""
        while (group := next(filter(self._may_open, self._waiting), None)) is not None:
            opened = self._opened(group)
            tensors = self._waiting.pop(group)
            for name in list(tensors):
                held = tensors.pop(name)
                self._held -= held.nbytes
                self._fill(opened, name, held, held.clone)

    def finish(self) -> None:
        """Finish the groups that are left, when everything has come.

        Raises:
            SourceError: tensors are missing; they are named.
        """
        if self._source is None:
            self.take_as_it_comes()
            self._restore()
        needed = set() if self._takers is None else self._takers.keys()
        missing = sorted((needed | set(self.job.plan.fallback)) - self._arrived)
        if missing:
            called = some(list(map(self._fed.called, missing)))
            raise SourceError(f"{len(missing)} tensors were promised and did not come: {called}")
        for group in list(self._todo):  # What takes no tensor is filled and processed all the same.
            self._complete(self._opened(group))
        for opened in sorted(self._late, key=lambda late: late.group.deferred):
            self._close(opened)
        self._late.clear()
        self._fall_back()
        self.processing.settle()

    def _restore(self) -> None:
        """Put initial values into tensors without a layer that nothing else writes: before what may read them."""
        names = self.job.restored.difference(*(group.names for group in self.job.groups))
        if not names:
            return
        if self.strategy.exclusive:
            self.turn.take()
        for name, memory in self.strategy.memory_for(sorted(names), ()).items():
            self.strategy.wrote = True
            host.copy_bytes(memory, self.job.initial[name])

    # Groups.

    def _comes_late(self, group: LayerGroup) -> bool:
        """Whether it is closed after the others: it is deferred, or the model's own code will write to it."""
        return group.deferred or bool(group.layers and self.job.plan.fallback)

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
        return 0 if self.job.first or group.deferred else group.device_nbytes(self.job.layout)

    def _opened(self, group: LayerGroup) -> _Open:
        self._todo.pop(group, None)
        if self.strategy.exclusive:
            self.turn.take()
        opened = self._made(group)
        for name in (*group.names, *group.touched) if not self.job.first else ():
            if name in self.job.initial:
                self.strategy.wrote |= group.in_place
                host.copy_bytes(opened.destinations[name], self.job.initial[name])
        if not group.deferred and not group.in_place:
            self._layers.open(group, (layer.name for layer in group.layers), self._counted(group))
        self._open[group] = opened
        return opened

    def _made(self, group: LayerGroup) -> _Open:
        live = {name: self.job.live[name] for name in group.touched if name in self.job.live}
        if self.job.first:
            return _Open(group, None, live)
        if group.in_place:
            return _Open(
                group, None, {**live, **self.strategy.memory_for(group.touched, self.job.partial & group.touched)}
            )
        scratch = Mirror(self.job.layout, host.scratch)
        inside = {name: scratch[name] for name in group.names}
        self._done.hold_scratch(scratch.nbytes)
        return _Open(group, scratch, {**live, **inside})

    def _close_in_time(self, opened: _Open) -> None:
        if self._comes_late(opened.group):
            self._late.append(opened)
        else:
            self._close(opened)

    def _close(self, opened: _Open) -> None:
        group, scratch = opened.group, opened.scratch
        self._open.pop(group, None)
        if self.job.first:
            if group.layers:
                self._fall_back()
            self.processing.first(group)
        elif scratch is not None:
            with self.turn.briefly() if group.layers else nullcontext():  # Layers hold scratch then.
                self.processing.run(group, scratch, ready=self._fall_back)
            self._done.hold_scratch(-scratch.nbytes)
        self._layers.close(group)

    def _fall_back(self) -> None:
        """Let the model's own code load what could not be planned: once, when all else that it may read is there."""
        plan = self.job.plan
        if not plan.fallback or self._fell_back:
            return
        self._fell_back = True
        if self.strategy.exclusive:
            self.turn.take()
        self.strategy.memory_for([name for name, tensor in self.job.live.items() if has_bytes(tensor)], ())
        self.strategy.wrote = True
        source = self._source or StateSource(self._fallen)
        layers = {layer.module for group in self.job.groups for layer in group.layers}
        others = [module for module in modules_held(self.job.model) if module not in layers]
        with (
            Pool() as pool,
            self.timeline.event("fall back", ""),
            nullcontext() if self.job.first else unmoved(others),
        ):
            fall_back(
                plan, self.job.model, source, {}, self._done, by=self.job.by, pool=pool, advance=lambda nbytes: None
            )

    # Its end.

    @signals.whole
    def forget(self) -> None:
        """Let go of open layers, of tensors that wait, and let readers in. May be called twice."""
        for group in [*self._open, *(opened.group for opened in self._late)]:
            self._layers.close(group)
        for kept in (self._todo, self._open, self._late, self._waiting, self._fallen):
            kept.clear()
        self._source = None
        self.turn.give_back()

    def report(self, previous: str | int | None, version: str | int, written: int, copied: int) -> UpdateReport:
        """What was done to make the version that is live now.

        Args:
            previous: the version before.
            version: the version now.
            written: bytes that the commit wrote.
            copied: bytes of the copy of the model that is kept.
        """
        plan, done = self.job.plan, self._done
        used = [name for name, fate in plan.fates.items() if fate in (Fate.WRITTEN, Fate.CAST, Fate.TIED)]
        return UpdateReport(
            version=version,
            previous=previous,
            atomic=None if self.job.first else self.strategy.name,
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
            tensors=self._fates(),
            casts={**plan.casts, **self._casts},
            restored=tuple(sorted(self.job.restored)),
            planned=sum(name not in plan.fallback for name in used),
            fell_back=tuple(map(str, plan.graph_breaks)),
            replaced=tuple(self.processing.replaced),
            bytes_by_io=dict(done.bytes_by_io),
            warnings=(self._layers.warning,) if self._layers.warning else (),
            events=tuple(self.timeline.events),
            mismatched=plan.mismatched,
        )

    def _fates(self) -> dict[Fate, tuple[str, ...]]:
        fates = self.job.plan.fates
        return {
            fate: tuple(sorted(name for name in fates if (Fate.CAST if name in self._casts else fates[name]) is fate))
            for fate in Fate
        }


def _check_kept(spec: TensorSpec, tensor: torch.Tensor) -> None:
    if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
        raise SourceError(
            f"{spec.name}: {spec.dtype} {list(spec.shape)} was promised, {tensor.dtype} {list(tensor.shape)} came"
        )
