"""Runs the steps of a plan from a source into destinations. It decides nothing that the plan has decided."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from .devices import Event, record_event
from .errors import TiedWeightsDiffer
from .manifest import OpaqueDtype, TensorSpec
from .memory import PAGE, Pool, advise_huge_pages, host_empty
from .plan import Copy, LoadPlan, Program, pieces
from .sources.contracts import Addressed, InMemory, Read, Reading, Sink, Source
from .sources.streams import ahead

__all__ = ["Execution", "execute"]

_LARGE = 4 * 1024 * 1024  # bytes from which a destination is worth a huge page
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


def execute(
    plan: LoadPlan,
    source: Source,
    destinations: Mapping[str, torch.Tensor],
    done: Execution,
    *,
    pool: Pool,
    reading: Reading = "auto",
    threads: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Do every step of ``plan``. Ties are proven before the first write.

    Args:
        plan: what to do.
        source: where the bytes come from.
        destinations: the model's tensors by name; they are written in place.
        done: is kept up to date, also when this raises.
        pool: memory for what cannot be read in place.
        reading: which road files are read by.
        threads: how many read at once.
        advance: called as bytes arrive, from any thread.

    Raises:
        TiedWeightsDiffer: nothing was written.
        CheckpointChanged: a file changed; some destinations may have been written.
    """

    def arrive(nbytes: int) -> None:
        done.arrive(nbytes)
        if advance is not None:
            advance(nbytes)

    with torch.no_grad():
        if isinstance(source, Addressed):
            read = partial(source.read, pool=pool, reading=reading, threads=threads, advance=arrive)
            _from_addressed(plan, source, read, destinations, done, pool)
        else:
            _from_stream(plan, source, destinations, done, arrive)


def _from_addressed(
    plan: LoadPlan,
    source: Addressed,
    read: partial[dict[str, int]],
    destinations: Mapping[str, torch.Tensor],
    done: Execution,
    pool: Pool,
) -> None:
    _prove_ties(plan, source.manifest, partial(_equal_by_pieces, source, read, done))
    reads: list[Read] = []
    for step in plan.steps:
        if isinstance(step, Copy):
            reads += _reads(source.manifest[step.source], destinations[step.destination], pool.slot_nbytes - 2 * PAGE)
    done.writing = True
    done.count(read(reads))
    done.bytes_written += sum(destinations[step.destination].nbytes for step in plan.steps if isinstance(step, Copy))
    programs = sorted(
        (step for step in plan.steps if isinstance(step, Program)),
        key=lambda step: min(map(source.position, step.sources)),
    )
    stop = threading.Event()
    work = (partial(_gather, step, source.manifest, partial(read, stop=stop), done) for step in programs)

    def halt() -> None:
        stop.set()
        pool.wake()

    gathered = ahead(work, depth=1, stop=halt)
    try:
        for step, tensors in zip(programs, gathered, strict=True):
            _run(step, tensors, destinations, done)
    finally:
        gathered.close()


def _reads(spec: TensorSpec, destination: torch.Tensor, slot_nbytes: int) -> Iterator[Read]:
    """How one copy is read: straight into the destination if the bytes are the same, else in pieces by the pool."""
    nbytes = spec.nbytes
    if nbytes == 0:
        return
    if destination.is_cpu and destination.dtype == spec.dtype and destination.is_contiguous():
        if nbytes >= _LARGE:
            advise_huge_pages(destination)
        yield Read(spec.name, 0, nbytes, destination)
        return
    assert not isinstance(spec.dtype, OpaqueDtype)
    itemsize = spec.dtype.itemsize
    for index, first, shape in pieces(tuple(destination.shape), slot_nbytes // itemsize):
        piece = destination[index]
        yield Read(spec.name, first * itemsize, piece.numel() * itemsize, _copy_into(piece, spec.dtype, shape))


def _copy_into(piece: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Sink:
    def sink(raw: torch.Tensor) -> Event | None:
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()  # A file may pack a float32 behind three bytes; torch cannot view that in place.
        with torch.no_grad():  # Grad mode belongs to a thread, and this may be any.
            piece.copy_(raw.view(dtype).view(shape), non_blocking=True)
        return record_event(piece.device)

    return sink


def _gather(
    step: Program, manifest: Mapping[str, TensorSpec], read: Callable[[list[Read]], dict[str, int]], done: Execution
) -> dict[str, torch.Tensor]:
    """The program's sources in scratch of their own."""
    tensors: dict[str, torch.Tensor] = {}
    for name in step.sources:
        spec = manifest[name]
        assert not isinstance(spec.dtype, OpaqueDtype)
        tensors[name] = host_empty(spec.shape, spec.dtype)
        done.hold_scratch(spec.nbytes)
    done.count(read([Read(name, 0, tensor.nbytes, tensor) for name, tensor in tensors.items()]))
    return tensors


def _run(
    step: Program, tensors: dict[str, torch.Tensor], destinations: Mapping[str, torch.Tensor], done: Execution
) -> None:
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    made = step.run(tensors)
    extra = sum(tensor.nbytes for tensor in made.values())
    done.hold_scratch(extra)
    for name, tensor in made.items():
        destinations[name].copy_(tensor)
        done.bytes_written += destinations[name].nbytes
    done.hold_scratch(-nbytes - extra)


def _from_stream(
    plan: LoadPlan,
    source: Source,
    destinations: Mapping[str, torch.Tensor],
    done: Execution,
    arrive: Callable[[int], None],
) -> None:
    copies = {step.source: step for step in plan.steps if isinstance(step, Copy)}
    users = {name: step for step in plan.steps if isinstance(step, Program) for name in step.sources}
    waiting: dict[int, dict[str, torch.Tensor]] = {}
    later = dict.fromkeys(second for _, second in plan.ties)
    if isinstance(source, InMemory):
        _prove_ties(plan, source.manifest, lambda one, other: _same_bits(source.borrow(one), source.borrow(other)))
        later = {}
    kept: dict[str, torch.Tensor] = {}
    done.writing = True
    with source.leases() as stream:
        for lease in stream:
            if lease.name in copies:
                destination = destinations[copies[lease.name].destination]
                destination.copy_(lease.tensor.reshape(destination.shape), non_blocking=True)
                done.bytes_written += destination.nbytes
                lease.release(after=record_event(destination.device))
            elif lease.name in users:
                step = users[lease.name]
                gathered = waiting.setdefault(id(step), {})
                gathered[lease.name] = lease.own()
                done.hold_scratch(lease.spec.nbytes)
                if len(gathered) == len(step.sources):
                    _run(step, waiting.pop(id(step)), destinations, done)
            elif lease.name in later:
                kept[lease.name] = lease.own()
            else:
                continue
            done.count({"memory": lease.spec.nbytes})
            arrive(lease.spec.nbytes)
    _compare_late(plan, kept, {name: destinations[step.destination] for name, step in copies.items()})


def _prove_ties(plan: LoadPlan, manifest: Mapping[str, TensorSpec], equal: Callable[[str, str], bool]) -> None:
    """Compare what becomes the same tensor, before anything is written."""
    differing = [(one, other) for one, other in plan.ties if manifest[one].nbytes and not equal(one, other)]
    _refuse(differing)


def _compare_late(plan: LoadPlan, kept: Mapping[str, torch.Tensor], written: Mapping[str, torch.Tensor]) -> None:
    """The same for a source that comes as it comes: the second is compared with what the first became."""
    _refuse(
        (one, other)
        for one, other in plan.ties
        if other in kept and not _same_bits(kept[other].to(written[one].dtype), written[one].to(kept[other].device))
    )


def _refuse(differing: Iterable[tuple[str, str]]) -> None:
    problems = [f"{one} and {other} are one tensor in the model, and differ in the source" for one, other in differing]
    if problems:
        raise TiedWeightsDiffer("tied weights differ", problems)


def _equal_by_pieces(
    source: Addressed, read: Callable[[list[Read]], dict[str, int]], done: Execution, one: str, other: str
) -> bool:
    nbytes = source.manifest[one].nbytes
    left, right = (host_empty((min(nbytes, _COMPARED),), torch.uint8) for _ in range(2))
    done.hold_scratch(left.nbytes + right.nbytes)
    try:
        for start in range(0, nbytes, _COMPARED):
            count = min(_COMPARED, nbytes - start)
            done.count(read([Read(one, start, count, left[:count]), Read(other, start, count, right[:count])]))
            if not torch.equal(left[:count], right[:count]):
                return False
        return True
    finally:
        done.hold_scratch(-left.nbytes - right.nbytes)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    # Bits, not values: a NaN is equal to itself here, and -0.0 differs from 0.0.
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
