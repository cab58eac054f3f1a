"""Reading bytes of files into memory, by the road that fits. It knows files and ranges, not tensors.

Two roads. *Buffered*: ``preadv`` through the page cache, straight into the wished memory; neighbours share a read.
*Direct*: ``O_DIRECT`` around the page cache into a pool's slot on huge pages, then a copy. ``auto`` asks each piece
with ``cachestat`` and ``RWF_NOWAIT`` what is cached, takes that straight, and reads the rest directly
(docs/decisions/0002). There is no mmap: a file that shrinks under a mapping kills the process, under ``preadv`` it is
an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from operator import attrgetter
from typing import NamedTuple, get_args

import msgspec
import torch

from ..errors import CheckpointChanged, CheckpointError, Closed, UnknownName, UsageError
from ..memory import PAGE, Pool, buffer
from .contracts import Reading, Sink

__all__ = ["File", "Segment", "fill", "read_segments"]

_IOV_MAX = 1024  # buffers of one preadv
_PIECE = 16 * 1024 * 1024  # bytes of one job at most; between two jobs a stop is seen
_FADVISE = getattr(os, "posix_fadvise", None)  # not on macOS
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)
_DIRECT: int = getattr(os, "O_DIRECT", 0)
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)
_NOT_CACHED = (errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


Buffer = bytearray | memoryview | ctypes.Array[ctypes.c_char]

_libc = ctypes.CDLL(None, use_errno=True)
_CACHESTAT = ctypes.c_long(451)  # Linux 6.5; the number is the same on every architecture that torch runs on.


class _CacheRange(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("nbytes", ctypes.c_uint64))


class _CacheState(ctypes.Structure):
    """``struct cachestat`` of linux/mman.h, in pages."""

    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


def _rest(buffers: Sequence[Buffer], done: int) -> Sequence[Buffer]:
    """The buffers without their first ``done`` bytes."""
    if done == 0:
        return buffers
    rest: list[Buffer] = []
    for one in buffers:
        if done < len(one):
            rest.append(memoryview(one).cast("B")[done:] if done else one)
        done = max(0, done - len(one))
    return rest


class File:
    """An open file that notices when it is no longer the one that was opened.

    The owner closes it. Identity, size and modification time are compared by ``check``; a rewrite in place within
    the clock tick of the opening, with the same size, is not seen.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._where = os.path.abspath(path)  # A relative path would lead elsewhere after a chdir.
        self._direct_fd: int | None = None
        # Cleared by the first read that is refused; the descriptor stays until close.
        self._direct_works = bool(_DIRECT)
        self._lock = threading.Lock()
        try:
            # O_NONBLOCK: the opening of a named pipe would wait for a writer, for ever. Plain files do not mind.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte.
            raise CheckpointError(f"{path}: cannot be opened: {getattr(error, 'strerror', error)}") from error
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            self.close()
            raise CheckpointError(f"{path}: is {_kind(found.st_mode)}, not a file")
        self._opened = _fingerprint(found)
        self.size = self._opened[2]

    def pread(self, nbytes: int, offset: int) -> bytes:
        """Exactly ``nbytes`` from ``offset``, as bytes."""
        memory = bytearray(nbytes)
        if nbytes:
            self.read_into([memory], offset)
        return bytes(memory)

    def read_into(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Fill the buffers in turn with the file's bytes from ``offset``. Short reads are finished."""
        total = sum(map(len, buffers))
        done = self._preadv(buffers, offset)
        while done < total:
            if done == 0:
                raise self._short(offset)
            buffers, offset, total = _rest(buffers, done), offset + done, total - done
            done = self._preadv(buffers, offset)

    def cached_into(self, buffers: Sequence[Buffer], offset: int) -> int:
        """Like ``read_into``, but only what the page cache holds; returns how many bytes that was."""
        total, done = sum(map(len, buffers)), 0
        cached = self._cached(offset, total)
        # A read that may not wait still starts the kernel's readahead of what it misses, and the disk reads it twice.
        if cached is not None and 2 * cached < total:
            return 0
        if cached is not None and cached >= total:
            self.read_into(buffers, offset)
            return total
        while _NOWAIT and done < total:
            got = self._preadv(_rest(buffers, done), offset + done, _NOWAIT)
            if got == 0:
                break
            done += got
        return done

    def _cached(self, offset: int, nbytes: int) -> int | None:
        """Bytes of the pages in this range that the page cache holds, if the kernel says. Costs some microseconds."""
        asked, found = _CacheRange(offset, nbytes), _CacheState()
        if nbytes == 0 or _libc.syscall(_CACHESTAT, self._fd, ctypes.byref(asked), ctypes.byref(found), 0):
            return None  # Older kernels do not have it, and some sandboxes refuse it.
        return PAGE * int(found.cached)

    def will_need(self, start: int, stop: int) -> None:
        """Let the kernel begin to read all of ``file[start:stop]``, where it is not cached: it would go by small steps.

        Several threads that read one file look like random reads to its readahead.
        """
        cached = self._cached(start, stop - start)
        if _FADVISE is not None and cached is not None and 2 * cached < stop - start:
            with contextlib.suppress(OSError):
                _FADVISE(self._fd, start, stop - start, os.POSIX_FADV_WILLNEED)

    def direct_into(self, memory: torch.Tensor, offset: int) -> bool:
        """Fill page-aligned ``memory`` from page-aligned ``offset`` around the page cache, up to the file's end.

        Returns False if this file system cannot, or gives less than a page at a time.
        """
        fd = self._open_direct()
        if fd is None:
            return False
        done, wanted = 0, min(memory.numel(), self.size - offset)
        while done < wanted:
            before = done
            try:
                got = os.preadv(fd, [buffer(memory.data_ptr() + done, memory.numel() - done)], offset + done)
            except OSError as error:
                if error.errno in _NOT_DIRECT:
                    self._direct_works = False
                    return False
                raise self._failed(error, offset + done) from error
            done += got
            if done < wanted:
                done -= done % PAGE  # A short direct read may end anywhere; the next must start on a page.
                if done == before:
                    return False  # The other road finds out whether the file ends here.
        return True

    def check(self) -> None:
        """Raise ``CheckpointChanged`` if the path no longer leads to the file that was opened, unchanged."""
        try:
            on_disk = _fingerprint(os.stat(self._where))
        except OSError as error:
            raise CheckpointChanged(f"{self.path}: the file went away while it was open: {error.strerror}") from error
        try:
            opened = _fingerprint(os.fstat(self._fd))
        except OSError as error:
            raise self._failed(error, 0) from error
        for now in (opened, on_disk):
            for what, old, new in zip(("device", "inode", "size", "modification time"), self._opened, now, strict=True):
                if old != new:
                    verb = "replaced" if what in ("device", "inode") else "changed"
                    raise CheckpointChanged(
                        f"{self.path}: the file was {verb} after it was opened: {what} was {old}, is {new}"
                    )

    def close(self) -> None:
        """Close it. May be called twice."""
        with self._lock:
            fds = (self._fd, self._direct_fd)
            # Forget before closing: the numbers may be another file's at once, and a late thread must not read that.
            self._fd, self._direct_fd, self._direct_works = -1, None, False
            for fd in fds:
                if fd is not None and fd >= 0:
                    with contextlib.suppress(OSError):  # Nothing was written, so nothing is lost; Linux has closed it.
                        os.close(fd)

    def __repr__(self) -> str:
        return f"<File {self.path!r} {self.size} bytes{' closed' if self._fd < 0 else ''}>"

    def _preadv(self, buffers: Sequence[Buffer], offset: int, flags: int = 0) -> int:
        if self._fd < 0:
            raise Closed(f"{self.path} was closed")
        try:
            return os.preadv(self._fd, buffers, offset, flags) if flags else os.preadv(self._fd, buffers, offset)
        except OSError as error:
            if flags and error.errno in _NOT_CACHED:
                return 0
            raise self._failed(error, offset) from error

    def has_direct(self) -> bool:
        """Whether this file can be read around the page cache, as far as is known by now."""
        return self._open_direct() is not None

    def _open_direct(self) -> int | None:
        with self._lock:
            if self._direct_fd is None and self._direct_works and self._fd >= 0:
                try:
                    # Through /proc, so that it is the file that was opened, whatever the path leads to by now.
                    self._direct_fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC | _DIRECT)
                except OSError:
                    self._direct_works = False  # tmpfs and some network file systems have no direct reads.
            return self._direct_fd if self._direct_works else None

    def _failed(self, error: OSError, offset: int) -> CheckpointError | Closed:
        if self._fd < 0:
            return Closed(f"{self.path} was closed")
        return CheckpointError(f"{self.path}: reading at byte {offset} failed: {error.strerror}")

    def _short(self, offset: int) -> CheckpointChanged:
        return CheckpointChanged(f"{self.path}: ends at byte {offset}; {self.size} bytes were there when it was opened")


def _fingerprint(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _kind(mode: int) -> str:
    return "a directory" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"


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
    reading: Reading,
    threads: int | None,
    advance: Callable[[int], None] | None,
    stop: threading.Event | None,
) -> dict[str, int]:
    """Read all segments with a few threads. The arguments and errors are those of ``contracts.Addressed.read``."""
    if reading not in get_args(Reading):
        raise UnknownName("reading", reading, get_args(Reading))
    if pool.slot_nbytes < 3 * PAGE:
        raise UsageError(f"slots of {pool.slot_nbytes} bytes are too small to read into; {3 * PAGE} are the least")
    segments = list(segments)
    jobs = _plan_jobs(segments, min(_PIECE, pool.slot_nbytes - 2 * PAGE))
    crew = _Crew(jobs, pool, reading, advance, stop or threading.Event())
    roads = crew.run(max(1, min(threads or _default_threads(), len(jobs))))
    for segment in segments:
        if segment.nbytes == 0 and not isinstance(segment.into, torch.Tensor):
            segment.into(torch.empty(0, dtype=torch.uint8))  # Nothing to read, but its sink was promised a call.
    return roads


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
        reading: Reading,
        advance: Callable[[int], None] | None,
        stop: threading.Event,
    ) -> None:
        self._jobs = iter(jobs)
        self._pool = pool
        self._reading = reading
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
        if job.by_slot or (self._reading == "direct" and _DIRECT):
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
                    job.file.read_into(_rest(buffers, done), job.start + done)
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


def fill(file: File, memory: torch.Tensor, start: int, stop: int, reading: Reading) -> tuple[torch.Tensor, int]:
    """Read ``file[start:stop]`` into page-aligned ``memory``, which must be two pages larger.

    Returns the view of ``memory`` that holds the bytes (it starts where the file's own alignment puts it, so a tensor
    that is aligned in the file is aligned in memory), and how many bytes came around the page cache.
    """
    base = start - start % PAGE
    data = memory[start - base : stop - base]
    done = 0
    if reading == "auto":
        done = file.cached_into([buffer(data.data_ptr(), stop - start)], start)
    if done < stop - start:
        resume = start + done - (start + done) % PAGE
        if reading != "buffered" and file.direct_into(memory[resume - base : -(-(stop - base) // PAGE) * PAGE], resume):
            return data, stop - start - done
        file.read_into([buffer(data.data_ptr() + done, stop - start - done)], start + done)
    return data, 0
