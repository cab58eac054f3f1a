"""``execute``: do the steps of a plan with the bytes of a source."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

import torch

from ..dtypes import OpaqueDtype
from ..manifest import Manifest
from ..memory.addresses import PAGE
from ..memory.devices import record_events
from ..memory.extents import Extents
from ..memory.host import host_empty
from ..memory.pool import Pool
from ..plan.plan import LoadPlan
from ..plan.steps import Copy, Program
from ..signals import held
from ..sources.contracts import Addressed, InMemory, IOMode, Participant, Read, Source
from ..sources.streams import ahead
from .apart import held_apart
from .copy_step import (
    Destinations,
    any_inference,
    copy_now,
    part_of,
    run_step,
    writing_mode,
    written_nbytes,
)
from .filling import Filling
from .reads import reads_of
from .report import Tally
from .requests import request_nbytes, requests_of, used_nbytes
from .ties import COMPARED, prove_ties, same_bits


@held  # Else a signal might leave autograd off.
def execute(
    plan: LoadPlan,
    source: Source,
    destinations: Destinations,
    done: Tally,
    *,
    pool: Pool,
    io: IOMode = "auto",
    threads: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Do every step of ``plan``. Ties are proven before the first write, unless the source is a stream.

    Args:
        plan: what to do.
        source: where the bytes come from. What lies in memory lies apart from the model's.
        destinations: the model's tensors by name; they are written in place.
        done: is kept up to date, also when this raises.
        pool: memory for what cannot be read in place.
        io: how files are read, see ``IOMode``.
        threads: how many read at once.
        advance: called as bytes arrive, from any thread.

    Returns:
        Those tensors of ``plan.fallback``, owned, for which the source cannot be asked again: because it is a stream.

    Raises:
        TiedWeightsDiffer: nothing was written; of a stream, everything was.
        CheckpointChanged: a file changed; some destinations may have been written.
        SourceError: a stream gave memory of the model that had been written by then.
    """

    @held
    def arrive(nbytes: int) -> None:
        done.arrive(nbytes)
        if advance is not None:
            advance(nbytes)

    with writing_mode(any_inference(destinations)):
        if isinstance(source, Addressed):
            read = partial(source.read, pool=pool, io=io, threads=threads, advance=arrive)
            _Addressed(plan, source, read, destinations, done, pool).run()
            return {}
        if isinstance(source, InMemory):
            _from_memory(plan, source, destinations, done, arrive)
            return {}
        return _from_stream(plan, source, destinations, done, arrive)


class _Addressed:
    """One execution from a source that can be asked for any bytes."""

    def __init__(
        self,
        plan: LoadPlan,
        source: Addressed,
        read: Callable[..., dict[str, int]],
        destinations: Destinations,
        done: Tally,
        pool: Pool,
    ) -> None:
        self._plan = plan
        self._source = source
        self._read = read
        self._destinations = destinations
        self._done = done
        self._pool = pool

    def run(self) -> None:
        prove_ties(self._plan, self._source.manifest, self._equal)
        self._done.writing = True
        for steps in self._plan.batches():
            self._copy([step for step in steps if isinstance(step, Copy)])
            self._run_programs([step for step in steps if isinstance(step, Program)])

    def _copy(self, steps: Sequence[Copy]) -> None:
        manifest, limit = self._source.manifest, self._pool.slot_nbytes - 2 * PAGE
        reads = (reads_of(step, manifest[step.source], self._destinations[step.destination], limit) for step in steps)
        # A generator: a model's tensors lie all over the memory, and a second visit to each would cost a cache miss.
        self._done.count(self._read(chain.from_iterable(reads)))
        self._done.bytes_written += sum(written_nbytes(step, self._destinations) for step in steps)

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
                run_step(step, tensors, self._plan, self._destinations, self._done)
        finally:
            gathered.close()

    def _gather(self, step: Program, stop: threading.Event) -> dict[str, torch.Tensor]:
        """Read the program's sources into scratch of its own, which it may change."""
        tensors = {name: _scratch(self._source.manifest, name) for name in step.sources}
        self._done.hold_scratch(sum(tensor.nbytes for tensor in tensors.values()))
        reads = [Read(name, 0, tensor.nbytes, tensor) for name, tensor in tensors.items()]
        self._done.count(self._read(reads, stop=stop))
        return tensors

    def _equal(self, first: Copy, second: Copy) -> bool:
        if first.of is not None or second.of is not None:
            return self._equal_parts(first, second)
        nbytes = self._source.manifest[first.source].nbytes
        left, right = (host_empty((min(nbytes, COMPARED),), torch.uint8) for _ in range(2))
        self._done.hold_scratch(left.nbytes + right.nbytes)
        try:
            for start in range(0, nbytes, COMPARED):
                count = min(COMPARED, nbytes - start)
                sides = ((first.source, left[:count]), (second.source, right[:count]))
                self._done.count(self._read([Read(name, start, count, memory) for name, memory in sides]))
                if not torch.equal(left[:count], right[:count]):
                    return False
            return True
        finally:
            self._done.hold_scratch(-left.nbytes - right.nbytes)

    def _equal_parts(self, first: Copy, second: Copy) -> bool:
        parts = []
        for step in (first, second):
            tensor = _scratch(self._source.manifest, step.source)
            self._done.count(self._read([Read(step.source, 0, tensor.nbytes, tensor)]))
            parts.append(part_of(step, tensor))
        return same_bits(*parts)


def owned(source: Addressed | InMemory, name: str, read: Callable[..., dict[str, int]]) -> torch.Tensor:
    """One tensor of ``source`` in memory of its own, the caller's. ``read`` is the source's, with its options bound."""
    if isinstance(source, InMemory):
        return source.borrow(name).clone(memory_format=torch.contiguous_format)
    tensor = _scratch(source.manifest, name)
    read([Read(name, 0, tensor.nbytes, tensor)])
    return tensor


def _scratch(manifest: Manifest, name: str) -> torch.Tensor:
    spec = manifest[name]
    assert not isinstance(spec.dtype, OpaqueDtype)
    return host_empty(spec.shape, spec.dtype)


def _from_memory(
    plan: LoadPlan, source: InMemory, destinations: Destinations, done: Tally, arrive: Callable[[int], None]
) -> None:
    borrow = source.borrow

    def equal(first: Copy, second: Copy) -> bool:
        return same_bits(part_of(first, borrow(first.source)), part_of(second, borrow(second.source)))

    prove_ties(plan, source.manifest, equal)
    done.writing = True
    for steps in plan.by_level():
        for step in steps:
            if isinstance(step, Copy):
                copy_now(step, borrow(step.source), destinations, done)
            else:
                tensors = {name: borrow(name).clone(memory_format=torch.contiguous_format) for name in step.sources}
                done.hold_scratch(sum(tensor.nbytes for tensor in tensors.values()))
                run_step(step, tensors, plan, destinations, done)
            nbytes = used_nbytes(step, source.manifest)
            done.count({"memory": nbytes})
            arrive(nbytes)


def _from_stream(
    plan: LoadPlan, source: Source, destinations: Destinations, done: Tally, arrive: Callable[[int], None]
) -> dict[str, torch.Tensor]:
    requests = requests_of(plan, source)
    nbytes = {request.name: request_nbytes(request, plan.manifest) for request in requests}
    if isinstance(source, Participant):
        source.wanted(requests)
    filling = Filling(plan, destinations, done)
    done.writing = True
    # The model's own code, which loads what falls back, may write anywhere.
    targets = destinations if plan.fallback else {name for step in plan.steps for name in step.destinations}
    extents = Extents(destinations[name] for name in targets)
    with source.leases() as stream:
        leases = (lease for lease in stream if lease.name in filling.missing)
        for lease in held_apart(leases, extents, partial(_begun, plan, filling, destinations)):
            devices = filling.take(lease.name, lease.tensor, lease.own)
            done.count({"memory": nbytes[lease.name]})
            arrive(nbytes[lease.name])
            lease.release(after=record_events(devices))
    return filling.finish()


def _begun(plan: LoadPlan, filling: Filling, destinations: Destinations) -> Extents:
    """What may have been written by now."""
    steps = (step for step in plan.steps if not filling.missing.issuperset(step.sources))
    return Extents(destinations[name] for step in steps for name in step.destinations)
