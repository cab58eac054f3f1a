"""Reading bytes of files into memory, by the I/O path that fits. It knows files and ranges, not tensors.

Two I/O paths. *Buffered*: ``preadv`` through the page cache, straight into the memory asked for; neighbours share a
read. *Direct*: ``O_DIRECT`` around the page cache into a pool's slot on huge pages, then a copy. ``auto`` asks each
piece with ``cachestat`` and ``RWF_NOWAIT`` what is cached, takes that straight, and reads the rest directly
(docs/decisions/0002).
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from operator import attrgetter
from typing import NamedTuple, get_args

import msgspec
import torch

from ...errors import Closed, UnknownName, UsageError
from ...memory.host import PAGE, buffer
from ...memory.pool import Pool
from ..contracts import IOMode, Sink
from .file import DIRECT, File, rest

_IOV_MAX = 1024  # buffers of one preadv
_PIECE = 16 * 1024 * 1024  # bytes of one job at most; between two jobs a stop is seen


class Segment(msgspec.Struct, frozen=True, gc=False):
    """``nbytes`` of a file from ``offset``, into memory or to a sink. See ``contracts.Read``."""

    file: File
    offset: int
    nbytes: int
    into: torch.Tensor | Sink


_Part = tuple[int, int, torch.Tensor | Sink]  # nbytes, first byte within the target, target


class _Job(NamedTuple):
    """Neighbouring pieces that share a read: ``file[start:stop]``, and where each part of it goes."""

    file: File
    start: int
    stop: int
    parts: list[_Part]
    by_slot: bool


def read_segments(
    segments: Iterable[Segment],
    *,
    pool: Pool,
    io: IOMode,
    threads: int | None,
    advance: Callable[[int], None] | None,
    stop: threading.Event | None,
) -> dict[str, int]:
    """Read all segments with a few threads. The arguments and errors are those of ``contracts.Addressed.read``."""
    if io not in get_args(IOMode):
        raise UnknownName("io", io, get_args(IOMode))
    if pool.slot_nbytes < 3 * PAGE:
        raise UsageError(f"slots of {pool.slot_nbytes} bytes are too small to read into; {3 * PAGE} are the least")
    segments = list(segments)
    jobs = _plan_jobs(segments, min(_PIECE, pool.slot_nbytes - 2 * PAGE))
    crew = _Crew(jobs, pool, io, advance, stop or threading.Event())
    bytes_by_io = crew.run(max(1, min(threads or _default_threads(), len(jobs))))
    for segment in segments:
        if segment.nbytes == 0 and not isinstance(segment.into, torch.Tensor):
            segment.into(
                torch.empty(0, dtype=torch.uint8, device="cpu")
            )  # Nothing to read, but its sink was promised a call.
    return bytes_by_io


def _default_threads() -> int:
    return min(4, 2 * (os.cpu_count() or 1))


def _plan_jobs(segments: Sequence[Segment], limit: int) -> list[_Job]:
    """Neighbours joined, large ones cut, in the order in which they lie in the files."""
    jobs: list[_Job] = []
    parts: list[_Part] = []
    last, begin, end, room, slot = None, 0, 0, 0, False  # of the job at hand, whose parts are being collected

    def finish() -> None:
        if last is not None:
            jobs.append(_Job(last, begin, end, parts, slot))

    for segment in _in_place(segments):
        file, offset, nbytes, into = segment.file, segment.offset, segment.nbytes, segment.into
        by_slot = not isinstance(into, torch.Tensor)
        if by_slot and nbytes > limit:
            raise UsageError(f"a sink's read of {nbytes} bytes does not fit into a slot; at most {limit} do")
        # A part that would be cut begins a job of its own: cuts cost more than a shorter neighbour.
        if 0 < nbytes <= room and offset == end and file is last and by_slot is slot and len(parts) < _IOV_MAX:
            parts.append((nbytes, 0, into))
            end += nbytes
            room -= nbytes
            continue
        for done in range(0, nbytes, limit):
            finish()
            size = min(limit, nbytes - done)
            last, begin, end, slot = file, offset + done, offset + done + size, by_slot
            parts, room = [(size, done, into)], limit - size
    finish()
    return jobs


def _in_place(segments: Sequence[Segment]) -> list[Segment]:
    found = sorted(segments, key=attrgetter("offset"))
    if any(segment.file is not found[0].file for segment in found):
        found.sort(key=lambda segment: segment.file.path)
    return found


class _Crew:
    """The threads of one ``read_segments``: they share a list of jobs, the first error and the stop."""

    def __init__(
        self,
        jobs: list[_Job],
        pool: Pool,
        io: IOMode,
        advance: Callable[[int], None] | None,
        stop: threading.Event,
    ) -> None:
        self._jobs = iter(jobs)
        self._pool = pool
        self._reading = io
        self._advance = advance
        self._stop = stop  # The caller's: it ends us, we never set it.
        self._failed = threading.Event()  # Ours: set by the first thread that fails, and by an interrupt.
        self._lock = threading.Lock()
        self._roads = {"buffered": 0, "direct": 0}  # Changes under the lock.

    def run(self, threads: int) -> dict[str, int]:
        if threads == 1:
            self._work()
        else:
            self._work_together(threads)
        if self._stop.is_set():
            raise Closed("the reading was stopped")
        return self._roads

    def _work_together(self, threads: int) -> None:
        executor = ThreadPoolExecutor(threads, thread_name_prefix="hotweights-read")
        futures: list[Future[None]] = []
        try:
            for _ in range(threads):
                futures.append(executor.submit(self._work))
            # Waiting in slices lets Ctrl-C through, and a caller's stop.
            while wait(futures, timeout=0.1, return_when=FIRST_EXCEPTION).not_done and not self._ended():
                pass
        except BaseException:
            self._failed.set()  # Each thread sees it after its piece.
            raise
        finally:
            self._pool.wake()
            executor.shutdown(wait=True)
        errors = [error for future in futures if (error := future.exception()) is not None]
        # A thread whose wait was ended by another's failure says so; the failure itself is the one to tell.
        for error in sorted(errors, key=lambda error: isinstance(error, Closed)):
            raise error

    def _work(self) -> None:
        try:
            while not self._ended():
                with self._lock:
                    job = next(self._jobs, None)
                if job is None:
                    return
                self._do(job)
        except BaseException:
            self._failed.set()
            raise

    def _ended(self) -> bool:
        return self._stop.is_set() or self._failed.is_set()

    def _do(self, job: _Job) -> None:
        if job.by_slot or (self._reading == "direct" and DIRECT):
            direct = self._through_slot(job, 0)
        else:
            buffers = [buffer(into.data_ptr() + first, size) for size, first, into in job.parts]  # type: ignore[union-attr]
            done = 0 if self._reading == "buffered" else job.file.cached_into(buffers, job.start)
            direct = 0
            if done < job.stop - job.start:
                if self._reading == "auto" and job.file.has_direct():
                    direct = self._through_slot(job, done)
                else:
                    job.file.will_need(job.start + done, job.stop)
                    job.file.read_into(rest(buffers, done), job.start + done)
            job.file.check()
        total = job.stop - job.start
        with self._lock:
            self._roads["direct"] += direct
            self._roads["buffered"] += total - direct
        if self._advance is not None:
            self._advance(total)

    def _through_slot(self, job: _Job, done: int) -> int:
        """Bring the job's bytes from ``done`` on into a slot and on to their targets; returns the direct bytes."""
        slot = self._pool.acquire(f"{job.file.path} bytes {job.start}..{job.stop}", stop=self._ended)
        events = []
        try:
            data, direct = fill(job.file, slot.memory, job.start + done, job.stop, self._reading)
            job.file.check()
            position = -done
            for size, first, into in job.parts:
                skip = max(0, -position)
                if skip < size:
                    raw = data[position + skip : position + size]
                    if isinstance(into, torch.Tensor):
                        ctypes.memmove(into.data_ptr() + first + skip, raw.data_ptr(), size - skip)
                    else:
                        events.append(into(raw))
                position += size
        finally:
            slot.release(*(event for event in events if event is not None))
        return direct


def fill(file: File, memory: torch.Tensor, start: int, stop: int, io: IOMode) -> tuple[torch.Tensor, int]:
    """Read ``file[start:stop]`` into page-aligned ``memory``, which must be two pages larger.

    Returns the view of ``memory`` that holds the bytes (it starts where the file's own alignment puts it, so a tensor
    that is aligned in the file is aligned in memory), and how many bytes came around the page cache.
    """
    base = start - start % PAGE
    data = memory[start - base : stop - base]
    done = 0
    if io == "auto":
        done = file.cached_into([buffer(data.data_ptr(), stop - start)], start)
    if done < stop - start:
        resume = start + done - (start + done) % PAGE
        if io != "buffered" and file.direct_into(memory[resume - base : -(-(stop - base) // PAGE) * PAGE], resume):
            return data, stop - start - done
        file.read_into([buffer(data.data_ptr() + done, stop - start - done)], start + done)
    return data, 0
