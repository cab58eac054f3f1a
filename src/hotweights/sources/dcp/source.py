"""DcpSource: the tensors of a DCP directory. It is addressed: any bytes of any tensor, out of the parts they lie in."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch

from ...arguments import check_choices
from ...errors import CheckpointError
from ...manifest import Manifest, TensorSpec
from ...memory.digest import Digest
from ...memory.guards import Guard
from ...memory.host import ALIGNMENT, host_empty
from ...memory.lease import Lease, Slot
from ...memory.pool import Pool
from ...ranges import Range
from ...text import some
from ..checksums import Proof
from ..closing import ClosedByOwner
from ..contracts import IOMode, Read
from ..files.file import File
from ..files.reading import Segment
from ..owned import owned_tensors
from ..streams import LeaseStream, ahead, digest_of_leases
from .archive import Plain, Unreadable, find_plain
from .branch import find_branch
from .call import JointRead, Orders, ReadCall, check_read, fitting, in_rows
from .headers import read_headers
from .opened import cut_off, open_files, open_parts, stored_of
from .pieces import Mosaic, faults
from .place import NAME, DcpPlace, absent_ranks
from .saved import Saved, SavedTensor, Stored, read_saved
from .strips import Strip, single, strip


class _Home(NamedTuple):
    """A tensor, and how it lies: in which parts, and at which of them a reader begins."""

    spec: TensorSpec
    saved: SavedTensor
    mosaic: Mosaic
    position: tuple[int, int]


class DcpSource(ClosedByOwner):
    """The tensors of one DCP directory. Made by ``hotweights.open``; closing it closes the files.

    The manifest lists tensors in the order in which their first parts lie in the files. What is no tensor is not read.
    """

    def __init__(self, place: DcpPlace, digests: str | os.PathLike[str] | None = None) -> None:
        self.path = str(place.directory)
        self._proof: Proof | None = None
        with ExitStack() as undo:
            self._open(place, undo)
            if digests is not None:
                self._proof = Proof(
                    self.path, dict.fromkeys(self.files), [*self._manifest], Path(digests), self._digests
                )
            undo.pop_all()
        self._closed = False

    def _open(self, place: DcpPlace, undo: ExitStack) -> None:
        self._said: File | None = None  # where it is no header that says what was saved
        self._plain: dict[Stored, Plain] = {}  # Filled as parts are read; two threads may find the same.
        self._texts: dict[str, dict[str, str]] = {}
        self._files: dict[str, File] = {}
        saved, problems = self._saved(place, undo)
        branch = find_branch(self.path, saved.tensors, saved.keys, place.branch)
        tensors = {name: saved.tensors[origin] for origin, name in branch.names.items()}
        problems += [problem for name, tensor in tensors.items() for problem in faults(name, tensor)]
        if self._said is not None:
            self._files, broken = open_files(place.directory, tensors, undo)
            problems += broken + cut_off(self._files, tensors)
        elif problems and (absent := absent_ranks(place.parts)):
            problems.append(absent)
        if problems:
            raise CheckpointError(f"{self.path}: the checkpoint is broken", problems, cause="bad_part")
        self._numbers = {name: number for number, name in enumerate(self._files)}
        homes = sorted(map(self._home, tensors, tensors.values()), key=lambda home: home.position)
        self._homes = {home.spec.name: home for home in homes}
        self._manifest = Manifest(home.spec for home in homes)
        self._warnings = _passed_over(self.path, branch.others)
        if absent := absent_ranks(place.parts):
            self._warnings += (f"{self.path}: {absent} It is whole if those ranks had nothing to write",)

    def _saved(self, place: DcpPlace, undo: ExitStack) -> tuple[Saved, list[str]]:
        """What was saved; and what is wrong with files that say so themselves."""
        if place.parts:
            self._files, broken = open_parts(place.directory, place.parts, undo)
            headers = read_headers(self._files)
            self._plain, self._texts = headers.plain, headers.texts
            return headers.saved, broken + headers.problems
        self._said = File(str(place.directory / NAME))
        undo.callback(self._said.close)
        saved = read_saved(self._said.path, self._said.pread(self._said.size, 0))
        self._texts = {self._said.path: dict.fromkeys(saved.others, "no tensor")}
        return saved, []

    @property
    def manifest(self) -> Manifest:
        """Name, dtype and shape of every tensor."""
        return self._manifest

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of the checkpoint's files: those that hold tensors, and ``.metadata``, if that says where."""
        return tuple(file.path for file in self._every_file())

    @property
    def metadata(self) -> dict[str, dict[str, str]]:
        """What the checkpoint holds besides tensors, by the path of the file that says so."""
        return {path: dict(texts) for path, texts in self._texts.items()}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should read: that other tensors of the checkpoint may be meant."""
        return self._warnings

    def position(self, name: str) -> tuple[int, int]:
        """Which file (as an index into ``files``), and which byte of it, the tensor's first part starts at."""
        return self._homes[name].position

    def file_of(self, name: str) -> str:
        """The path of the file that holds the tensor; if several hold it, of ``.metadata``, or else of the first."""
        home = self._homes[name]
        files = {stored.file for stored in stored_of(home.saved)}
        if self._said is not None and len(files) != 1:
            return self._said.path
        return self.files[home.position[0]]

    def leases(self, *, guard: Guard = "off", pool: Pool | None = None, io: IOMode = "auto") -> LeaseStream:
        """Stream every tensor as a lease on the pool's memory, in the manifest's order, reading one slot ahead.

        Small tensors share a slot. A tensor larger than a slot is read into memory of its own, and its lease is not
        borrowed. Parts are read through the page cache, whatever ``io`` says.

        Args:
            guard: makes stale tensors loud, see ``guards``. If the pool's guard is stricter, that one holds.
            pool: where the leases lie; by default one of 2 x 32 MiB, which ends with the stream.
            io: which I/O path, see ``IOMode``.
        """
        check_choices(guard=(guard, Guard), io=(io, IOMode))
        self._begin()
        own = pool is None
        pool = pool or Pool(2, 32 * 1024 * 1024)
        stopped = threading.Event()
        return LeaseStream(self._lease_all(pool, own, guard, stopped, self.check), stop=partial(_stop, stopped, pool))

    def tensors(self, *, io: IOMode = "auto") -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor in memory of its own, read one batch ahead."""
        self._begin()
        return self._own_all(owned_tensors(self, self._manifest.values(), io=io))

    def read(
        self,
        reads: Iterable[Read],
        *,
        pool: Pool,
        io: IOMode = "auto",
        threads: int | None = None,
        advance: Callable[[int], None] | None = None,
        stop: threading.Event | None = None,
    ) -> dict[str, int]:
        """Do all the reads, see ``contracts.Addressed``. Bytes that lie between short rows are read, and not counted.

        What a sink gets out of several parts is put together in a slot; its short rows go through 1 MiB of our own.

        Raises:
            CheckpointError: a part cannot be read in place, and why; nothing of these reads was done.
        """
        self._begin()
        run = ReadCall(pool, threads, advance, stop or threading.Event())
        straight, joint = Orders(), []
        reads = list(reads)  # What is written by address stays alive.
        for read, memory, strips in self._located(reads):
            if memory is not None:
                straight.put(strips, memory)
            elif not strips:
                straight.segments.append(Segment(self._every_file()[-1], 0, 0, read.into))
            elif len(strips) == 1 and single(strips[0]):
                straight.segments.append(Segment(strips[0].file, strips[0].lying.offset, read.nbytes, read.into))
            else:
                joint.append(JointRead(read.name, read.start, read.nbytes, fitting(read, pool)))
        run.do(straight, io)
        for batch in _batches(joint, pool.slot_nbytes):
            self._join(batch, run)
        return run.done

    def check(self) -> None:
        """See that all files are those that were opened, and hold what ``digests`` says, see ``contracts.OnDisk``."""
        self._check_open()
        if self._proof is not None:
            self._proof.check()
        for file in self._every_file():
            file.check()

    def digest(self, *, io: IOMode = "auto") -> Digest:
        """The digest of every tensor, which is that of a model with the same names and values. Reads every byte."""
        with self.leases(io=io) as stream:
            return digest_of_leases(stream)

    def close(self) -> None:
        """Close the files. May be called twice."""
        self._closed = True
        if self._proof is not None:
            self._proof.close()
        for file in self._every_file():
            file.close()

    def __repr__(self) -> str:
        return f"<DcpSource {self.path!r}: {len(self._manifest)} tensors in {len(self._files)} files>"

    def _every_file(self) -> list[File]:
        return [*self._files.values(), *([] if self._said is None else [self._said])]

    def _begin(self) -> None:
        self._check_open()
        if self._proof is not None:
            self._proof.begin()

    def _digests(self, stopped: threading.Event) -> Digest:
        """The digest, for the proof, which ``check`` waits for: so this does not call that."""
        pool = Pool(2, 32 * 1024 * 1024)
        leases = self._lease_all(pool, True, "off", stopped, last=lambda: None)
        with LeaseStream(leases, stop=partial(_stop, stopped, pool)) as stream:
            return digest_of_leases(stream, stopped)

    def _home(self, name: str, tensor: SavedTensor) -> _Home:
        mosaic = Mosaic(tensor)
        position = min(((self._numbers[stored.file], stored.offset) for stored in stored_of(tensor)), default=(0, 0))
        return _Home(TensorSpec(name, tensor.dtype, tensor.shape), tensor, mosaic, position)

    # Where the bytes are.

    def _located(self, reads: Iterable[Read]) -> list[tuple[Read, torch.Tensor | None, list[Strip]]]:
        """What the reads take out of the files. Every part that cannot be read is found before the first byte is."""
        problems: dict[str, None] = {}
        located = []
        for read, asked, memory in in_rows(map(self._checked, reads)):
            located.append((read, memory, self._strips(read.name, asked, problems)))
        if problems:
            raise CheckpointError(f"{self.path}: the checkpoint is broken", problems, cause="bad_part")
        return located

    def _checked(self, read: Read) -> Read:
        check_read(read, self._homes[read.name].spec)
        return read

    def _strips(self, name: str, asked: Range, problems: dict[str, None]) -> list[Strip]:
        home = self._homes[name]
        mosaic, item = home.mosaic, home.saved.dtype.itemsize
        strips = []
        for number, begin, lengths, into, strides in mosaic.cut(asked):
            part = mosaic.parts[number]
            assert part.stored is not None
            file = self._files[part.stored.file]
            try:
                plain = self._plain.get(part.stored) or self._find(part.stored, file, home.saved.dtype, part.shape)
            except Unreadable as problem:
                problems[f"{file.path}: tensor {name!r}: its part at {list(part.offsets)} {problem}"] = None
                continue
            there = (*(stride * item for stride in plain.strides), 1)
            skip = sum((at - zero) * stride for at, zero, stride in zip(begin, (*part.offsets, 0), there, strict=True))
            strips.append(strip(file, lengths, (plain.offset + skip, there), (into, strides)))
        return strips

    def _find(self, stored: Stored, file: File, dtype: torch.dtype, shape: tuple[int, ...]) -> Plain:
        plain = self._plain[stored] = find_plain(file, stored, dtype, shape)
        return plain

    def _join(self, batch: Sequence[JointRead], run: ReadCall) -> None:
        """Put some reads together in one slot, and give each to its sink."""
        slot = run.pool.acquire(batch[0].name, stop=run.stop.is_set)
        events = []
        try:
            memories = _laid_out(slot, [read.nbytes for read in batch])
            self._fill(
                [
                    Read(read.name, read.start, read.nbytes, memory)
                    for read, memory in zip(batch, memories, strict=True)
                ],
                run,
            )
            events = [read.sink(memory) for read, memory in zip(batch, memories, strict=True)]
        finally:
            slot.release(*(event for event in events if event is not None))

    def _fill(self, reads: Iterable[Read], run: ReadCall) -> None:
        """Do reads into memory without a slot of the pool: the caller may hold the only one."""
        orders = Orders()
        for _, memory, strips in self._located(reads):
            assert memory is not None
            orders.put(strips, memory)
        run.do_without_slots(orders)

    # Streams.

    def _lease_all(
        self, pool: Pool, own: bool, guard: Guard, stopped: threading.Event, last: Callable[[], None]
    ) -> Generator[Lease, None, None]:
        groups = list(_batches(self._manifest.values(), pool.slot_nbytes))
        work = (partial(self._fill_slot, group, pool, stopped) for group in groups)
        slots = ahead(work, depth=min(1, pool.slots - 1), stop=partial(_stop, stopped, pool), drop=_drop)
        try:
            for group, (slot, memories) in zip(groups, slots, strict=True):
                try:
                    for spec, memory in zip(group, memories, strict=True):
                        yield _lease(spec, slot, memory, guard)
                finally:
                    if slot is not None:
                        slot.release()
            last()
        finally:
            slots.close()
            if own:
                pool.close()

    def _fill_slot(
        self, group: Sequence[TensorSpec], pool: Pool, stopped: threading.Event
    ) -> tuple[Slot | None, list[torch.Tensor]]:
        sizes = [spec.nbytes for spec in group]
        slot = pool.acquire(group[0].name, stop=stopped.is_set) if sizes[0] <= pool.slot_nbytes else None
        try:
            memories = [host_empty((sizes[0],), torch.uint8)] if slot is None else _laid_out(slot, sizes)
            reads = (Read(spec.name, 0, spec.nbytes, memory) for spec, memory in zip(group, memories, strict=True))
            self._fill(reads, ReadCall(pool, None, None, stopped))
        except BaseException:
            if slot is not None:
                slot.release()
            raise
        return slot, memories

    def _own_all(
        self, pairs: Generator[tuple[str, torch.Tensor], None, None]
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        with closing(pairs):  # Also where this is closed before its first tensor.
            yield from pairs
        self.check()


def _passed_over(path: str, others: Sequence[str]) -> tuple[str, ...]:
    if not others:
        return ()
    ways = " or ".join(f"subfolder={json.dumps(other)}" for other in others[:3])
    return (f"{path}: opened the model's dict, and passed over {some(others, 3)}; if that is what you mean: {ways}",)


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


_Item = TypeVar("_Item", bound=_Sized)


def _batches(items: Iterable[_Item], limit: int) -> Iterator[list[_Item]]:
    """Items that fit into ``limit`` bytes together; a larger one is a batch of its own."""
    batch: list[_Item] = []
    nbytes = 0
    for item in items:
        if batch and nbytes + item.nbytes > limit:
            yield batch
            batch, nbytes = [], 0
        batch.append(item)
        nbytes += _aligned(item.nbytes)
    if batch:
        yield batch


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _laid_out(slot: Slot, sizes: Iterable[int]) -> list[torch.Tensor]:
    """Memory of these sizes in the slot, each where every dtype may lie."""
    memories, position = [], 0
    for nbytes in sizes:
        memories.append(slot.memory[position : position + nbytes])
        position += _aligned(nbytes)
    return memories


def _lease(spec: TensorSpec, slot: Slot | None, memory: torch.Tensor, guard: Guard) -> Lease:
    if slot is None:
        return Lease(spec, raw=memory, borrowed=False, guard=guard)
    return slot.lease(spec, memory.data_ptr() - slot.memory.data_ptr(), guard)


def _stop(stopped: threading.Event, pool: Pool) -> None:
    stopped.set()
    pool.wake()


def _drop(filled: tuple[Slot | None, list[torch.Tensor]]) -> None:
    """Give a slot back to its pool that was read ahead and never streamed."""
    slot, _ = filled
    if slot is not None:
        slot.release()
