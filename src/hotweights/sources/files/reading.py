"""Reading ranges of files into memory, by the I/O path that fits.

There are two. *Buffered* is ``preadv`` through the page cache, straight into the memory asked for; neighbours share a
read. *Direct* is ``O_DIRECT`` around the page cache into a pool's slot on huge pages, then a copy. ``auto`` finds out
by ``cachestat`` and ``RWF_NOWAIT`` what is cached of each piece, reads that buffered, and the rest directly
(docs/decisions/0002). Objects of a store have one path, ``"network"``: requests, straight into the memory asked for.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from operator import attrgetter
from typing import NamedTuple

import msgspec
import torch

from ...arguments import check_choices
from ...errors import Closed, UsageError
from ...memory.addresses import PAGE, buffer
from ...memory.pool import Pool
from ..contracts import IOMode, Sink
from .file import DIRECT, Buffer, File, rest
from .place import Readable

_IOV_MAX = 1024  # buffers of one preadv
_PIECE = 16 * 1024 * 1024  # bytes of one job at most; a stop is seen between two jobs


class Segment(msgspec.Struct, frozen=True, gc=False):
    """``nbytes`` of a file from ``offset`` on, and where they go. See ``contracts.Read``."""

    file: Readable
    offset: int
    nbytes: int
    into: torch.Tensor | Sink


_Share = tuple[int, int, torch.Tensor | Sink]  # nbytes, first byte within the memory, the memory or sink


class _JointRead(NamedTuple):
    """Neighbouring segments that share a read: ``file[start:stop]``, and where it goes, in order."""

    file: Readable
    start: int
    stop: int
    shares: list[_Share]
    by_slot: bool
    unwanted: int  # bytes between the segments


def read_segments(
    segments: Iterable[Segment],
    *,
    pool: Pool,
    io: IOMode,
    threads: int | None,
    advance: Callable[[int], None] | None,
    stop: threading.Event | None,
    gap: int = 0,
    piece: int = _PIECE,
) -> dict[str, int]:
    """Read all segments with a few threads. The arguments and errors are those of ``contracts.Addressed.read``.

    Segments of one file that lie at most ``gap`` bytes apart share a read; what lies between them is read, too. Reads
    have at most ``piece`` bytes. Where there is a gap, each read costs: they are filled to the last byte then.
    """
    check_choices(io=(io, IOMode))
    if pool.slot_nbytes < 3 * PAGE:
        raise UsageError(
            f"slots of {pool.slot_nbytes} bytes are too small to read into; Pool(slot_nbytes={3 * PAGE}) is the least"
        )
    segments = list(segments)
    jobs = _plan_jobs(segments, min(piece, pool.slot_nbytes - 2 * PAGE), gap)
    crew = _Crew(jobs, pool, io, advance, stop or threading.Event())
    bytes_by_io = crew.run(max(1, min(threads or _default_threads(), len(jobs))))
    for segment in segments:
        if segment.nbytes == 0 and not isinstance(segment.into, torch.Tensor):
            # There was nothing to read, but every sink is promised a call.
            segment.into(torch.empty(0, dtype=torch.uint8, device="cpu"))
    return bytes_by_io


def _default_threads() -> int:
    return min(4, 2 * (os.cpu_count() or 1))


def _plan_jobs(segments: Sequence[Segment], limit: int, gap: int = 0) -> list[_JointRead]:
    """Neighbours joined, large ones cut, in the order in which they lie in the files."""
    waste = torch.empty(gap, dtype=torch.uint8, device="cpu")  # for bytes that nobody wants; never read
    jobs: list[_JointRead] = []
    shares: list[_Share] = []
    # Of the job whose shares are being collected:
    last, begin, end, room, slot, unwanted = None, 0, 0, 0, False, 0

    def finish() -> None:
        if last is not None:
            jobs.append(_JointRead(last, begin, end, shares, slot, unwanted))

    for segment in _as_they_lie(segments):
        file, offset, nbytes, into = segment.file, segment.offset, segment.nbytes, segment.into
        by_slot = not isinstance(into, torch.Tensor)
        if by_slot and nbytes > limit:
            raise UsageError(f"a sink's read of {nbytes} bytes does not fit into a slot; at most {limit} do")
        between = offset - end
        fits = gap > 0 or len(shares) < _IOV_MAX - 1  # A request has no such bound.
        joins = file is last and by_slot is slot and 0 <= between <= gap and fits
        if joins and 0 < nbytes <= room - between:
            if between:
                shares.append((between, 0, waste[:between]))
                end, room, unwanted = offset, room - between, unwanted + between
            shares.append((nbytes, 0, into))
            end += nbytes
            room -= nbytes
            continue
        # A segment that would be cut begins a job of its own: a cut costs more than a shorter job before it. Not where
        # each job is a request.
        begun = room - between if joins and gap and not by_slot and nbytes > room - between > 0 else 0
        if begun:
            shares += [(between, 0, waste[:between]), (begun, 0, into)] if between else [(begun, 0, into)]
            end, unwanted = offset + begun, unwanted + between
        for done in range(begun, nbytes, limit):
            finish()
            size = min(limit, nbytes - done)
            last, begin, end, slot, unwanted = file, offset + done, offset + done + size, by_slot, 0
            shares, room = [(size, done, into)], limit - size
    finish()
    return jobs


def _as_they_lie(segments: Sequence[Segment]) -> list[Segment]:
    ordered = sorted(segments, key=attrgetter("offset"))
    if any(segment.file is not ordered[0].file for segment in ordered):
        ordered.sort(key=lambda segment: segment.file.path)
    return ordered


class _Crew:
    """The threads of one ``read_segments``: they share a list of jobs, the first error and the stop."""

    def __init__(
        self,
        jobs: list[_JointRead],
        pool: Pool,
        io: IOMode,
        advance: Callable[[int], None] | None,
        stop: threading.Event,
    ) -> None:
        self._jobs = iter(jobs)
        self._pool = pool
        self._io = io
        self._advance = advance
        self._stop = stop  # The caller's; it is never set here.
        self._failed = threading.Event()  # Set by the first thread that fails, and by an interrupt.
        self._lock = threading.Lock()
        self._bytes_by_io = {"buffered": 0, "direct": 0}  # Changes under the lock.

    def run(self, threads: int) -> dict[str, int]:
        if threads == 1:
            self._work()
        else:
            self._work_together(threads)
        if self._stop.is_set():
            raise Closed("the reading was stopped")
        return self._bytes_by_io

    def _work_together(self, threads: int) -> None:
        executor = ThreadPoolExecutor(threads, thread_name_prefix="hotweights-read")
        futures: list[Future[None]] = []
        try:
            for _ in range(threads):
                futures.append(executor.submit(self._work))
            # The wait is in slices, so that Ctrl-C and the caller's stop are seen.
            while wait(futures, timeout=0.1, return_when=FIRST_EXCEPTION).not_done and not self._ended():
                pass
        except BaseException:
            self._failed.set()  # Each thread sees it when its job is done.
            raise
        finally:
            self._pool.wake()
            executor.shutdown(wait=True)
        errors = [error for future in futures if (error := future.exception()) is not None]
        # A thread whose wait another's failure ended raises Closed. The failure itself is the error to raise.
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

    def _do(self, job: _JointRead) -> None:
        file = job.file
        if job.by_slot or (self._io == "direct" and DIRECT and isinstance(file, File)):
            direct = self._through_slot(job, 0)
        else:
            buffers = [buffer(into.data_ptr() + first, size) for size, first, into in job.shares]  # type: ignore[union-attr]
            direct = self._in_place(job, file, buffers) if isinstance(file, File) else 0
            if not isinstance(file, File):
                file.read_into(buffers, job.start, self._ended)
            file.check()
        total = job.stop - job.start
        with self._lock:
            self._bytes_by_io["direct"] += direct
            path = "buffered" if isinstance(file, File) else "network"
            self._bytes_by_io[path] = self._bytes_by_io.get(path, 0) + total - direct
        if self._advance is not None:
            self._advance(total - job.unwanted)

    def _in_place(self, job: _JointRead, file: File, buffers: Sequence[Buffer]) -> int:
        """Read the job's bytes straight to where they go, as far as they are cached; returns the direct bytes."""
        done = 0 if self._io == "buffered" else file.cached_into(buffers, job.start)
        if done < job.stop - job.start:
            if self._io == "auto" and file.has_direct():
                return self._through_slot(job, done)
            file.will_need(job.start + done, job.stop)
            file.read_into(rest(buffers, done), job.start + done)
        return 0

    def _through_slot(self, job: _JointRead, done: int) -> int:
        """Read the job's bytes from ``done`` on into a slot, then to where they go; returns the direct bytes."""
        slot = self._pool.acquire(f"{job.file.path} bytes {job.start}..{job.stop}", stop=self._ended)
        events = []
        try:
            data, direct = fill(job.file, slot.memory, job.start + done, job.stop, self._io, self._ended)
            job.file.check()
            position = -done
            for size, first, into in job.shares:
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


def fill(
    file: Readable, memory: torch.Tensor, start: int, stop: int, io: IOMode, ended: Callable[[], bool] = bool
) -> tuple[torch.Tensor, int]:
    """Read ``file[start:stop]`` into page-aligned ``memory``, which must be two pages larger.

    Returns the view of ``memory`` that holds the bytes, and how many came around the page cache. The view starts as far
    behind a page as the bytes do in the file: a tensor that is aligned in the file is aligned in memory.
    """
    base = start - start % PAGE
    data = memory[start - base : stop - base]
    if not isinstance(file, File):
        file.read_into([buffer(data.data_ptr(), stop - start)], start, ended)
        return data, 0
    done = 0
    if io == "auto":
        done = file.cached_into([buffer(data.data_ptr(), stop - start)], start)
    if done < stop - start:
        resume = start + done - (start + done) % PAGE
        if io != "buffered" and file.direct_into(memory[resume - base : -(-(stop - base) // PAGE) * PAGE], resume):
            return data, stop - start - done
        file.read_into([buffer(data.data_ptr() + done, stop - start - done)], start + done)
    return data, 0
