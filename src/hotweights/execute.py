"""Runs the steps of a plan from a source into destinations. It decides nothing that the plan has decided."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch

from .aliases import has_bytes
from .copying import reads_of
from .devices import record_events
from .errors import TiedWeightsDiffer
from .manifest import Manifest, OpaqueDtype
from .memory import PAGE, Pool, host_empty
from .plan import Copy, LoadPlan, Program, Step
from .replay import run_program, view
from .sources.contracts import Addressed, InMemory, Read, Reading, Source
from .sources.streams import ahead

__all__ = ["Execution", "Filling", "execute", "owned", "place_of"]

_COMPARED = 8 * 1024 * 1024  # bytes of each of two tied tensors that are compared at once


@dataclass(slots=True)
class Execution:
    """What has been done so far. ``execute`` changes it; whoever catches its error may read it."""

    bytes_read: int = 0
    bytes_written: int = 0
    writing: bool = False  # From the first write on, an error leaves tensors of two versions.
    scratch: int = 0
    peak_scratch: int = 0
    roads: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def arrive(self, nbytes: int) -> None:
        """Count bytes as they arrive, from any thread."""
        with self.lock:
            self.bytes_read += nbytes

    def count(self, roads: Mapping[str, int]) -> None:
        """Add bytes that arrived, by road."""
        with self.lock:
            for road, nbytes in roads.items():
                self.roads[road] = self.roads.get(road, 0) + nbytes

    def hold_scratch(self, nbytes: int) -> None:
        """Count scratch memory that is taken (or, negative, given back)."""
        with self.lock:
            self.scratch += nbytes
            self.peak_scratch = max(self.peak_scratch, self.scratch)


Destinations = Mapping[str, torch.Tensor]


def execute(
    plan: LoadPlan,
    source: Source,
    destinations: Destinations,
    done: Execution,
    *,
    pool: Pool,
    reading: Reading = "auto",
    threads: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Do every step of ``plan``. Ties are proven before the first write, unless the source comes as it comes.

    Args:
        plan: what to do.
        source: where the bytes come from.
        destinations: the model's tensors by name; they are written in place.
        done: is kept up to date, also when this raises.
        pool: memory for what cannot be read in place.
        reading: which road files are read by.
        threads: how many read at once.
        advance: called as bytes arrive, from any thread.

    Returns:
        Those tensors of ``plan.fallback``, owned, for which the source cannot be asked again: because it comes as it
        comes, or because its tensors share memory with the model.

    Raises:
        TiedWeightsDiffer: nothing was written.
        CheckpointChanged: a file changed; some destinations may have been written.
    """

    def arrive(nbytes: int) -> None:
        done.arrive(nbytes)
        if advance is not None:
            advance(nbytes)

    with _mode(_any_inference(destinations)):
        if isinstance(source, Addressed):
            read = partial(source.read, pool=pool, reading=reading, threads=threads, advance=arrive)
            _Addressed(plan, source, read, destinations, done, pool).run()
            return {}
        if isinstance(source, InMemory):
            return _from_memory(plan, source, destinations, done, arrive)
        return _from_stream(plan, source, destinations, done, arrive)


def _any_inference(destinations: Destinations) -> bool:
    lazy = torch.nn.parameter.is_lazy
    return any(not lazy(tensor) and tensor.is_inference() for tensor in destinations.values())


def _mode(inference: bool) -> AbstractContextManager[object]:
    """Writes inside are not seen by autograd. Tensors made under inference mode may only be written under it."""
    return torch.inference_mode() if inference else torch.no_grad()


class _Addressed:
    """One execution from a source that gives any bytes."""

    def __init__(
        self,
        plan: LoadPlan,
        source: Addressed,
        read: Callable[..., dict[str, int]],
        destinations: Destinations,
        done: Execution,
        pool: Pool,
    ) -> None:
        self._plan = plan
        self._source = source
        self._read = read
        self._destinations = destinations
        self._done = done
        self._pool = pool

    def run(self) -> None:
        _prove_ties(self._plan, self._source.manifest, self._equal)
        self._done.writing = True
        for steps in self._plan.batches():
            self._copy([step for step in steps if isinstance(step, Copy)])
            self._run_programs([step for step in steps if isinstance(step, Program)])

    def _copy(self, steps: Sequence[Copy]) -> None:
        manifest, limit = self._source.manifest, self._pool.slot_nbytes - 2 * PAGE
        wishes = (reads_of(step, manifest[step.source], self._destinations[step.destination], limit) for step in steps)
        # Made one by one as they are taken: a model's tensors lie all over the memory, and each visit costs.
        self._done.count(self._read(chain.from_iterable(wishes)))
        self._done.bytes_written += sum(_written_nbytes(step, self._destinations) for step in steps)

    def _run_programs(self, programs: list[Program]) -> None:
        programs.sort(key=lambda step: min(map(self._source.position, step.sources), default=(-1, -1)))
        stop = threading.Event()

        def halt() -> None:
            stop.set()
            self._pool.wake()

        work = (partial(self._gather, step, stop) for step in programs)
        gathered = ahead(work, depth=1, stop=halt)
        try:
            for step, tensors in zip(programs, gathered, strict=True):
                _run(step, tensors, self._plan, self._destinations, self._done)
        finally:
            gathered.close()

    def _gather(self, step: Program, stop: threading.Event) -> dict[str, torch.Tensor]:
        """The program's sources in scratch of their own."""
        tensors = {name: _scratch(self._source.manifest, name) for name in step.sources}
        self._done.hold_scratch(sum(tensor.nbytes for tensor in tensors.values()))
        reads = [Read(name, 0, tensor.nbytes, tensor) for name, tensor in tensors.items()]
        self._done.count(self._read(reads, stop=stop))
        return tensors

    def _equal(self, one: Copy, other: Copy) -> bool:
        if one.of is not None or other.of is not None:
            return self._equal_parts(one, other)
        nbytes = self._source.manifest[one.source].nbytes
        left, right = (host_empty((min(nbytes, _COMPARED),), torch.uint8) for _ in range(2))
        self._done.hold_scratch(left.nbytes + right.nbytes)
        try:
            for start in range(0, nbytes, _COMPARED):
                count = min(_COMPARED, nbytes - start)
                reads = [Read(one.source, start, count, left[:count]), Read(other.source, start, count, right[:count])]
                self._done.count(self._read(reads))
                if not torch.equal(left[:count], right[:count]):
                    return False
            return True
        finally:
            self._done.hold_scratch(-left.nbytes - right.nbytes)

    def _equal_parts(self, one: Copy, other: Copy) -> bool:
        parts = []
        for step in (one, other):
            tensor = _scratch(self._source.manifest, step.source)
            self._done.count(self._read([Read(step.source, 0, tensor.nbytes, tensor)]))
            parts.append(_part(step, tensor))
        return _same_bits(*parts)


def owned(source: Addressed | InMemory, name: str, read: Callable[..., dict[str, int]]) -> torch.Tensor:
    """One tensor of ``source`` in memory of its own."""
    if isinstance(source, InMemory):
        return source.borrow(name).clone(memory_format=torch.contiguous_format)
    tensor = _scratch(source.manifest, name)
    read([Read(name, 0, tensor.nbytes, tensor)])
    return tensor


def _scratch(manifest: Manifest, name: str) -> torch.Tensor:
    spec = manifest[name]
    assert not isinstance(spec.dtype, OpaqueDtype)
    return host_empty(spec.shape, spec.dtype)


def _run(
    step: Program, tensors: dict[str, torch.Tensor], plan: LoadPlan, destinations: Destinations, done: Execution
) -> None:
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    run_program(step, tensors, plan.constants, lambda name: destinations[name].detach())
    done.bytes_written += sum(region.box.nbytes for region in step.writes)
    done.hold_scratch(-nbytes)


def _part(step: Copy, tensor: torch.Tensor) -> torch.Tensor:
    """The part of the source ``tensor`` that ``step`` copies."""
    if step.of is None:
        return tensor
    return view(tensor.contiguous(), step.of)


def place_of(step: Copy, destinations: Destinations) -> torch.Tensor:
    """The part of the model's tensor that ``step`` writes."""
    destination = destinations[step.destination]
    return destination if step.into is None else view(destination, step.into)


def _written_nbytes(step: Copy, destinations: Destinations) -> int:
    return destinations[step.destination].nbytes if step.into is None else step.into.nbytes


def _copy_now(step: Copy, tensor: torch.Tensor, destinations: Destinations, done: Execution) -> torch.device:
    place = place_of(step, destinations)
    part = _part(step, tensor)
    place.copy_(part if part.shape == place.shape else part.reshape(place.shape), non_blocking=True)
    done.bytes_written += place.nbytes
    return place.device


def _from_memory(
    plan: LoadPlan, source: InMemory, destinations: Destinations, done: Execution, arrive: Callable[[int], None]
) -> dict[str, torch.Tensor]:
    private = _private(plan, source, destinations)
    done.hold_scratch(sum(tensor.nbytes for tensor in private.values()))

    def borrow(name: str) -> torch.Tensor:
        return private[name] if name in private else source.borrow(name)

    def equal(one: Copy, other: Copy) -> bool:
        return _same_bits(_part(one, borrow(one.source)), _part(other, borrow(other.source)))

    _prove_ties(plan, source.manifest, equal)
    done.writing = True
    for steps in plan.by_level():
        for step in steps:
            names = (step.source,) if isinstance(step, Copy) else step.sources
            if isinstance(step, Copy):
                _copy_now(step, borrow(step.source), destinations, done)
            else:
                tensors = {name: borrow(name).clone(memory_format=torch.contiguous_format) for name in names}
                done.hold_scratch(sum(tensor.nbytes for tensor in tensors.values()))
                _run(step, tensors, plan, destinations, done)
            nbytes = _read_nbytes(step, source.manifest)
            done.count({"memory": nbytes})
            arrive(nbytes)
    return {name: private[name] for name in plan.fallback if name in private}


def _private(plan: LoadPlan, source: InMemory, destinations: Destinations) -> dict[str, torch.Tensor]:
    """Copies of the plan's tensors that share memory with the model: they would change under the copying."""
    written = {tensor.untyped_storage().data_ptr() for tensor in destinations.values() if has_bytes(tensor)}
    steps = (*plan.steps, *(step for pair in plan.ties for step in pair))
    names = dict.fromkeys((*(name for step in steps for name in _names(step)), *plan.fallback))
    borrowed = ((name, source.borrow(name)) for name in names)
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in borrowed
        if has_bytes(tensor) and tensor.untyped_storage().data_ptr() in written
    }


def _read_nbytes(step: Step, manifest: Manifest) -> int:
    if isinstance(step, Copy):
        return manifest[step.source].nbytes if step.of is None else step.of.nbytes
    return sum(manifest[name].nbytes for name in step.sources)


def _from_stream(
    plan: LoadPlan, source: Source, destinations: Destinations, done: Execution, arrive: Callable[[int], None]
) -> dict[str, torch.Tensor]:
    filling = Filling(plan, destinations, done)
    done.writing = True
    with source.leases() as stream:
        for lease in stream:
            if lease.name not in filling.missing:
                continue
            devices = filling.take(lease.name, lease.tensor, lease.own)
            done.count({"memory": lease.spec.nbytes})
            arrive(lease.spec.nbytes)
            lease.release(after=record_events(devices))
    return filling.finish()


class Filling:
    """A plan that is followed as its tensors arrive, in any order. What cannot be done at once waits, owned.

    Attributes:
        missing: names of the tensors that have not arrived. Whoever uses it sees that none comes twice.
        kept: tensors that wait for others.
    """

    def __init__(self, plan: LoadPlan, destinations: Destinations, done: Execution) -> None:
        self._plan, self._destinations, self._done = plan, destinations, done
        self._inference = _any_inference(destinations)  # Asked once: take() comes for every tensor.
        first, *rest = [*plan.by_level()] or [()]
        self._copies: dict[str, list[Copy]] = defaultdict(list)
        for step in first:
            if isinstance(step, Copy):
                self._copies[step.source].append(step)
        self._later = [step for step in first if isinstance(step, Program)], *rest
        self._wanted = {name for steps in self._later for step in steps for name in _names(step)}
        self._wanted |= {second.source for _, second in plan.ties} | set(plan.fallback)
        self.missing = self._wanted | self._copies.keys()
        self.kept: dict[str, torch.Tensor] = {}

    def take(self, name: str, tensor: torch.Tensor, own: Callable[[], torch.Tensor]) -> set[torch.device]:
        """Do what can be done with a tensor that has arrived; it is borrowed until the device's queue is done.

        Args:
            name: of the tensor, one of ``missing``.
            tensor: is not kept.
            own: gives a tensor of the same values that may be kept.

        Returns:
            The devices whose queues may still read it.
        """
        self.missing.discard(name)
        if name in self._wanted:
            self.kept[name] = own()
            self._done.hold_scratch(tensor.nbytes)
        with _mode(self._inference):
            return {_copy_now(step, tensor, self._destinations, self._done) for step in self._copies.get(name, ())}

    def placed(self, name: str) -> None:
        """The bytes of one of ``missing`` lie where its only copy would have put them."""
        self.missing.discard(name)
        self._done.bytes_written += sum(_written_nbytes(step, self._destinations) for step in self._copies[name])

    def finish(self) -> dict[str, torch.Tensor]:
        """Do the rest, now that everything is there; returns the tensors of ``plan.fallback``, owned.

        Raises:
            TiedWeightsDiffer: names of one tensor carry different bytes. They were written.
        """
        kept, destinations = self.kept, self._destinations
        with _mode(self._inference):
            for step in (step for steps in self._later for step in steps):
                if isinstance(step, Copy):
                    _copy_now(step, kept[step.source], destinations, self._done)
                else:
                    sources = {name: kept[name].clone() for name in step.sources}
                    _run(step, sources, self._plan, destinations, self._done)
        _refuse(
            (one, other)
            for one, other in self._plan.ties
            if not _same_as_written(other, kept[other.source], one, destinations)
        )
        return {name: kept[name] for name in self._plan.fallback}


def _names(step: Step) -> tuple[str, ...]:
    return (step.source,) if isinstance(step, Copy) else step.sources


def _same_as_written(other: Copy, tensor: torch.Tensor, one: Copy, destinations: Destinations) -> bool:
    place = place_of(one, destinations)
    return _same_bits(_part(other, tensor).to(place.dtype), place.cpu())


def _prove_ties(plan: LoadPlan, manifest: Manifest, equal: Callable[[Copy, Copy], bool]) -> None:
    """Compare what becomes the same bytes, before anything is written."""
    _refuse((one, other) for one, other in plan.ties if manifest[one.source].nbytes and not equal(one, other))


def _refuse(differing: Iterable[tuple[Copy, Copy]]) -> None:
    problems = [
        f"{one.source} and {other.source} are one tensor in the model, and differ in the source"
        for one, other in differing
    ]
    if problems:
        raise TiedWeightsDiffer("tied weights differ", problems)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    # Bits, not values: a NaN is equal to itself here, and -0.0 differs from 0.0.
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
