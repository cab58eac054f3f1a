"""FileSource: the tensors of safetensors files. It is addressed: it reads any bytes, in any order, into any memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from typing import NamedTuple

import torch

from ...arguments import check_choices
from ...dtypes import OpaqueDtype
from ...errors import UsageError
from ...gc_pause import without_collection
from ...manifest import Manifest
from ...memory.addresses import PAGE
from ...memory.digest import Digest
from ...memory.guards import Guard
from ...memory.host import host_empty
from ...memory.lease import Lease, Slot
from ...memory.pool import Pool
from ..closing import ClosedByOwner
from ..contracts import IOMode, Read
from ..owned import owned_tensors
from ..streams import LeaseStream, ahead, digest_of_leases
from .header import Entry
from .place import Readable
from .reading import Segment, fill, read_segments
from .shards import Paths, open_checkpoint, path_of


class _Run(NamedTuple):
    """Neighbouring tensors of one file that are read at once."""

    file: Readable
    entries: list[Entry]
    nbytes: int


class FileSource(ClosedByOwner):
    """The tensors of one checkpoint on disk. Made by ``hotweights.open``; closing it closes the files.

    The manifest lists tensors file by file, in the order in which they lie there.
    """

    _piece = 16 * 1024 * 1024  # bytes of one read at most
    _gap = 0  # bytes between two ranges that are read with them, rather than by two reads

    def __init__(
        self,
        what: Paths,
        *,
        variant: str | None = None,
        subfolder: str | None = None,
        digests: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = path_of(what)
        with without_collection():
            checkpoint = open_checkpoint(what, variant=variant, subfolder=subfolder)
            self._checkpoint = checkpoint.proven(self.path, digests, self._digests)
        self._shards = self._checkpoint.shards
        self._closed = False
        self._homes = {
            entry.spec.name: (number, entry)
            for number, shard in enumerate(self._shards)
            for entry in shard.header.entries
        }
        self._manifest = Manifest(entry.spec for shard in self._shards for entry in shard.header.entries)

    @property
    def manifest(self) -> Manifest:
        """Name, dtype and shape of every tensor."""
        return self._manifest

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of the checkpoint's files."""
        return tuple(shard.file.path for shard in self._shards)

    @property
    def metadata(self) -> dict[str, dict[str, str]]:
        """The free-text metadata of each file, by path."""
        return {shard.file.path: dict(shard.header.metadata) for shard in self._shards}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should read: signs that the files are of two versions, or that others are meant."""
        return self._checkpoint.warnings

    def position(self, name: str) -> tuple[int, int]:
        """Which file (as an index into ``files``), and which byte of it, the tensor starts at."""
        number, entry = self._homes[name]
        return number, entry.offset

    def file_of(self, name: str) -> str:
        """The path of the file that holds the tensor."""
        return self._shards[self._homes[name][0]].file.path

    def leases(self, *, guard: Guard = "off", pool: Pool | None = None, io: IOMode = "auto") -> LeaseStream:
        """Stream every tensor as a lease on the pool's memory, in the manifest's order, reading one slot ahead.

        Neighbouring small tensors share a slot. A tensor larger than a slot is read into memory of its own, and its
        lease is not borrowed.

        Args:
            guard: makes stale tensors loud, see ``guards``. If the pool's guard is stricter, that one holds.
            pool: where the leases lie; by default one of 2 x 32 MiB, which ends with the stream.
            io: which I/O path, see ``IOMode``.
        """
        check_choices(guard=(guard, Guard))
        self._check_open()
        own = pool is None
        pool = pool or Pool(2, 32 * 1024 * 1024)
        stopped = threading.Event()
        leases = self._lease_all(pool, own, guard, self._begin(io), stopped, last=self.check)
        return LeaseStream(leases, stop=partial(_stop, stopped, pool))

    def tensors(self, *, io: IOMode = "auto") -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor in memory of its own, read one batch ahead.

        Raises:
            UnsupportedDtype: before the first tensor, if torch has no type for one; ``leases()`` carries its bytes.
        """
        self._check_open()
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
        """Do all the reads, see ``contracts.Addressed``."""
        self._check_open()
        io = self._begin(io)
        segments = [self._segment(read) for read in reads]
        how = {"gap": self._gap, "piece": self._piece}
        return read_segments(segments, pool=pool, io=io, threads=threads, advance=advance, stop=stop, **how)

    def check(self) -> None:
        """See that all files are those that were opened, and hold what ``digests`` says, see ``contracts.OnDisk``."""
        self._check_open()
        self._checkpoint.check()

    def digest(self, *, io: IOMode = "auto") -> Digest:
        """The digest of every tensor, which is that of a model with the same names and values. Reads every byte."""
        with self.leases(io=io) as stream:
            return digest_of_leases(stream)

    def _begin(self, io: IOMode) -> IOMode:
        """What is compared with digests is read through the page cache: around it, the disk would read it twice."""
        self._checkpoint.begin()
        return "buffered" if io == "auto" and self._checkpoint.proof is not None else io

    def _digests(self, stopped: threading.Event) -> Digest:
        """The digest, for the proof, which ``check`` waits for: so this does not call that."""
        pool = Pool(2, 32 * 1024 * 1024)
        leases = self._lease_all(pool, True, "off", "buffered", stopped, last=lambda: None)
        with LeaseStream(leases, stop=partial(_stop, stopped, pool)) as stream:
            return digest_of_leases(stream, stopped)

    def close(self) -> None:
        """Close the files. May be called twice."""
        self._closed = True
        self._checkpoint.close()

    def __repr__(self) -> str:
        return f"<FileSource {self.path!r}: {len(self._manifest)} tensors in {len(self._shards)} files>"

    def _segment(self, read: Read) -> Segment:
        (number, entry), into = self._homes[read.name], read.into
        # Memory is written by address: a request that does not fit would read a neighbour or overwrite a stranger.
        if read.start < 0 or read.nbytes < 0 or read.start + read.nbytes > entry.spec.nbytes:
            raise UsageError(
                f"tensor {read.name!r} has {entry.spec.nbytes} bytes; {read.nbytes} from {read.start} were asked for"
            )
        if isinstance(into, torch.Tensor) and not (into.nbytes == read.nbytes and into.is_cpu and into.is_contiguous()):
            raise UsageError(
                f"tensor {read.name!r}: {read.nbytes} bytes go into contiguous host memory of as many bytes, not into "
                f"{into.nbytes} of {'contiguous' if into.is_contiguous() else 'strided'} memory on {into.device}"
            )
        return Segment(self._shards[number].file, entry.offset + read.start, read.nbytes, into)

    def _runs(self, limit: int) -> Iterator[_Run]:
        """All tensors as runs of neighbours of at most ``limit`` bytes; a larger tensor is a run of its own."""
        for shard in self._shards:
            entries: list[Entry] = []
            nbytes = 0
            for entry in shard.header.entries:
                # A tensor that the index takes from another file leaves a gap.
                gap = entries and entry.offset != entries[0].offset + nbytes
                if entries and (gap or nbytes + entry.spec.nbytes > limit):
                    yield _Run(shard.file, entries, nbytes)
                    entries, nbytes = [], 0
                entries.append(entry)
                nbytes += entry.spec.nbytes
            if entries:
                yield _Run(shard.file, entries, nbytes)

    def _lease_all(
        self,
        pool: Pool,
        own: bool,
        guard: Guard,
        io: IOMode,
        stopped: threading.Event,
        *,
        last: Callable[[], None],
    ) -> Generator[Lease, None, None]:
        runs = list(self._runs(pool.slot_nbytes - 2 * PAGE))
        work = (partial(self._fill_slot, run, pool, io, stopped) for run in runs)
        slots = ahead(work, depth=min(1, pool.slots - 1), stop=partial(_stop, stopped, pool), drop=_drop)
        try:
            for run, (slot, data) in zip(runs, slots, strict=True):
                try:
                    yield from _lease_run(run, slot, data, guard)
                finally:
                    if slot is not None:
                        slot.release()
            last()
        finally:
            slots.close()
            if own:
                pool.close()

    def _own_all(
        self, pairs: Generator[tuple[str, torch.Tensor], None, None]
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        with closing(pairs):  # Also where this is closed before its first tensor.
            yield from pairs
        self.check()

    def _fill_slot(
        self, run: _Run, pool: Pool, io: IOMode, stopped: threading.Event
    ) -> tuple[Slot | None, torch.Tensor]:
        if run.nbytes > pool.slot_nbytes - 2 * PAGE:
            return None, self._read_large(run, pool, io, stopped)
        first = run.entries[0]
        slot = pool.acquire(first.spec.name, stop=stopped.is_set)
        try:
            data, _ = fill(run.file, slot.memory, first.offset, first.offset + run.nbytes, io, stopped.is_set)
            run.file.check()
        except BaseException:
            slot.release()
            raise
        return slot, data

    def _read_large(self, run: _Run, pool: Pool, io: IOMode, stopped: threading.Event) -> torch.Tensor:
        data = host_empty((run.nbytes,), torch.uint8)
        # Buffered: it may not ask the pool for a slot to bounce through while others hold all of them.
        self.read([Read(run.entries[0].spec.name, 0, run.nbytes, data)], pool=pool, io="buffered", stop=stopped)
        return data


def _lease_run(run: _Run, slot: Slot | None, data: torch.Tensor, guard: Guard) -> Iterator[Lease]:
    position = 0
    for spec in (entry.spec for entry in run.entries):
        raw = data[position : position + spec.nbytes]
        position += spec.nbytes
        itemsize = 1 if isinstance(spec.dtype, OpaqueDtype) else spec.dtype.itemsize
        if slot is None or raw.data_ptr() % itemsize:
            # No slot, or a file that packs a float32 behind three bytes: memory of its own.
            yield Lease(spec, raw=raw if slot is None else raw.clone(), borrowed=False, guard=guard)
        else:
            yield slot.lease(spec, raw.data_ptr() - slot.memory.data_ptr(), guard)


def _stop(stopped: threading.Event, pool: Pool) -> None:
    stopped.set()
    pool.wake()


def _drop(filled: tuple[Slot | None, torch.Tensor]) -> None:
    """Give a slot back to its pool that was read ahead and never streamed."""
    slot, _ = filled
    if slot is not None:
        slot.release()
