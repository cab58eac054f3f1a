"""Attempt: the work of one update. It takes tensors in, for the layer groups that ``assembly.py`` fills with them."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from functools import cached_property

import torch

from .. import signals
from ..dtypes import DType, format_name, may_cast, narrowest_cast
from ..errors import LiveModelError, SourceError
from ..loading.apart import held_apart
from ..loading.requests import bytes_to_read, request_nbytes
from ..loading.verify import Verifier
from ..manifest import Manifest, TensorSpec
from ..memory import host
from ..memory.devices import record_events
from ..memory.extents import Extents
from ..memory.pool import Pool
from ..model.reachable import reachable
from ..model.survey import own_loader
from ..plan.adapters import left_under
from ..plan.quantised import scaleless
from ..plan.steps import Fate, Program, Step
from ..plan.unused import unused
from ..sources.contracts import Addressed, InMemory, Request, Source
from ..sources.readers.source import ReaderSource
from ..text import size, some
from ..timeline import Timeline
from .assembly import Assembly, Own
from .fed_names import FedNames
from .groups import LayerGroup
from .job import Job
from .kernels import refuse_kernels
from .lock import WriteTurn
from .open_layers import OpenLayers
from .report import UpdateReport
from .requests import requests
from .strategy import Strategy


class Attempt:
    """One attempt.

    Attributes:
        job: what there is to do.
        strategy: where the bytes go until the commit.
        turn: the update's hold on the lock that keeps readers out.
        timeline: what the time was spent on.
        peak_buffer: bytes of the pool at peak.
    """

    def __init__(
        self, job: Job, strategy: Strategy, layers: OpenLayers, turn: WriteTurn, fed: FedNames, timeline: Timeline
    ) -> None:
        self.job, self.strategy, self.turn = job, strategy, turn
        self._fed = fed
        self.timeline = timeline
        timeline.open_nbytes = lambda: layers.nbytes
        self._assembly = Assembly(job, strategy, layers, turn, self.timeline)
        self.peak_buffer = 0
        self._layers = layers
        self._takers: dict[str, list[LayerGroup]] | None = None  # by tensor, from ``take_as_it_comes`` on
        self._waiting: dict[LayerGroup, dict[str, torch.Tensor]] = {}
        self._held = 0  # bytes of tensors that wait on the host for their layer's turn
        self._peak_held = 0
        self._arrived: set[str] = set()
        self._asked: dict[str, int] = {}  # bytes of each tensor, where the source sends what it is asked for
        self._casts: dict[str, str] = {}  # of tensors that came in other dtypes than the plan's

    @property
    def begun(self) -> list[LayerGroup]:
        """Groups whose processing in place, at the first load, has begun."""
        return self._assembly.processing.begun

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

    @property
    def open_warning(self) -> str:
        """The one warning of open layers, which was logged at once; empty if this attempt gave none."""
        return self._layers.warning

    def requests(self) -> list[Request]:
        """What to ask of a source that can choose: layer by layer, deferred layers last."""
        self.take_as_it_comes()
        wanted = requests(self._assembly.in_order(), self.job.plan, self._assembly.room)
        self._asked = {request.name: request_nbytes(request, self.manifest) for request in wanted}
        return wanted

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
        self._assembly.source = source
        self._assembly.restore()
        self._arrived |= set(self.manifest)
        for group in self._assembly.in_order():
            # Nothing of it outlives the call: scratch of the layer before would be held beside the next one's.
            self._assembly.read(group, source, close=verify is None, pool=pool, advance=advance, **options)
        if verify is not None:
            self._assembly.prove(verify, pool)

    def _stream(self, source: Source, advance: Callable[[int], None]) -> None:
        with source.leases() as stream:
            # Staged, what is live is not written before the commit. What is read from files may lie where a weight was
            # that processing has replaced and freed; it is no view of it.
            may_be_own = self.strategy.exclusive and not isinstance(source, ReaderSource)
            leases = held_apart(stream, self._own, self._begun) if may_be_own else stream
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
        """Get ready for tensors in any order, before the first. May be called again."""
        if self._takers is not None:
            return
        self._assembly.take_apart()
        self._takers = {}
        for group in self._assembly.todo:
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
        if self.job.first and self.begun:  # Processing replaced tensors that had been written.
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
        if self.job.kernels.meets(tensor):
            refuse_kernels([name])
        tensor, own = self._as_planned(spec, tensor, own)
        self._arrive(name, self._asked.get(name, spec.nbytes))
        if name in self.job.plan.fallback:
            self._assembly.fallen[name] = own()
        devices = {tensor.device}  # Copies to keep are made there.
        for group in self._takers_of(name):
            if self._assembly.may_take(group):
                devices |= self._assembly.fill(group, name, tensor, own)
            else:
                self._hold(group, name, tensor)
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
            _check_kept(spec, tensor, "was promised" if cast is None else "is expected, as in the live version")
            return tensor, own
        assert isinstance(spec.dtype, torch.dtype)
        change = f"{format_name(tensor.dtype)} -> {format_name(spec.dtype)}"
        steps = [step for group in self._takers_of(spec.name) for step in group.plan.steps if spec.name in step.sources]
        into = {self._dtype_written(step) for step in steps}
        # In between, a float of fewer bits would lose what the model's own could hold, and code may treat dtypes apart.
        if spec.name in self.job.plan.fallback or not into <= {spec.dtype} or not tensor.dtype.is_floating_point:
            raise SourceError(
                f"{spec.name}: {format_name(tensor.dtype)} came, and the live version came as "
                f"{format_name(spec.dtype)}; begin() without a manifest expects that, for a cast in between may lose "
                "what the model can hold. Say what will come: begin(hw.open(tensors).manifest)"
            )
        if not may_cast(tensor.dtype, spec.dtype, cast):
            needed = narrowest_cast(tensor.dtype, spec.dtype)
            raise SourceError(f'{spec.name}: {change} loses information; begin(cast="{needed}") allows it')
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
        self._assembly.done.count({"memory": nbytes})
        self._assembly.done.arrive(nbytes)

    def _placed(self, name: str, nbytes: int) -> None:
        """A tensor came, and its bytes lie already in the memory that the request gave."""
        self._arrive(name, nbytes)
        (group,) = self._takers_of(name)
        self._assembly.placed(group, name)
        self._drain()

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
        while (group := next(filter(self._assembly.may_take, self._waiting), None)) is not None:
            tensors = self._waiting.pop(group)
            for name in list(tensors):
                held = tensors.pop(name)
                self._held -= held.nbytes
                self._assembly.fill(group, name, held, held.clone)

    def finish(self) -> None:
        """Finish the groups that are left, when everything has come.

        Raises:
            SourceError: tensors are missing; they are named.
        """
        if self._assembly.source is None:
            self.take_as_it_comes()
            self._assembly.restore()
        needed = set() if self._takers is None else self._takers.keys()
        missing = sorted((needed | set(self.job.plan.fallback)) - self._arrived)
        if missing:
            called = some(list(map(self._fed.called, missing)))
            raise SourceError(f"{len(missing)} tensors were expected and did not come: {called}")
        self._assembly.finish()

    # Its end.

    @signals.whole
    def forget(self) -> None:
        """Let go of open layers, of tensors that wait, and let readers in. May be called twice."""
        self._assembly.forget()
        self._waiting.clear()
        self.turn.give_back()

    def report(self, previous: str | int | None, version: str | int, written: int, copied: int) -> UpdateReport:
        """What was done to make the version that is live now.

        Args:
            previous: the version before.
            version: the version now.
            written: bytes that the commit wrote.
            copied: bytes of the copy of the model that is kept.
        """
        plan, done = self.job.plan, self._assembly.done
        used = [name for name, fate in plan.fates.items() if fate in (Fate.WRITTEN, Fate.CAST, Fate.TIED)]
        return UpdateReport(
            version=version,
            previous=previous,
            atomic=None if self.job.first else self.strategy.name,
            bytes_read=done.bytes_read,
            bytes_written=done.bytes_written + written,
            seconds=time.perf_counter() - self.timeline.began,
            stall_seconds=self.turn.seconds,
            wait_seconds=self.turn.waited,
            peak_buffer_bytes=self.peak_buffer,
            peak_scratch_bytes=done.peak_scratch,
            peak_host_bytes=self._peak_held,
            copy_bytes=copied,
            open_layers=self._layers.peak_layers,
            open_bytes=self._layers.peak_nbytes,
            tensors=self._fates(),
            casts={**plan.casts, **self._casts},
            restored=tuple(sorted(self.job.restored)),
            kept=tuple(sorted(self.job.kept)),
            planned=sum(name not in plan.fallback for name in used),
            fell_back=tuple(map(str, plan.graph_breaks)),
            replaced=tuple(self._assembly.processing.replaced),
            bytes_by_io=dict(done.bytes_by_io),
            warnings=self._warnings(),
            events=tuple(self.timeline.events),
            mismatched=plan.mismatched,
            since_epoch=self.timeline.since_epoch,
            receiver=self.timeline.receiver,
        )

    def _warnings(self) -> tuple[str, ...]:
        job = self.job
        told = (self.open_warning,) if self.open_warning else ()
        told = (*told, *job.warnings, *scaleless(job.plan.manifest, {**job.plan.casts, **self._casts}))
        if job.kept:
            written = (name for step in job.plan.steps for name in step.destinations)
            return (*told, *left_under(written, job.plan.names(Fate.SKIPPED)))
        if own_loader(job.model, job.by) is None:
            return told
        if twice := self._assembly.processing.twice:
            what = "; process= has changed it after that: if both quantise, leave one of them out"
            told = (*told, f"{some(twice, 3)}{what}")
        return (*told, *unused(job.plan, f"{type(job.model).__name__}.load_weights"))

    def _fates(self) -> dict[Fate, tuple[str, ...]]:
        fates = self.job.plan.fates
        return {
            fate: tuple(sorted(name for name in fates if (Fate.CAST if name in self._casts else fates[name]) is fate))
            for fate in Fate
        }


def _check_kept(spec: TensorSpec, tensor: torch.Tensor, why: str) -> None:
    if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
        raise SourceError(
            f"{spec.name}: {spec.dtype} {list(spec.shape)} {why}, {tensor.dtype} {list(tensor.shape)} came"
        )
