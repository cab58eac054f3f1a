"""File: ranges of an open file, and whether it is still the file that was opened.

There is no mmap: a file that shrinks under a mapping kills the process. Under ``preadv`` that is an error. A process
may have few descriptors and a checkpoint many files: files that nobody reads give theirs up, see ``_Descriptors``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import resource
import stat
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ... import signals
from ...errors import CheckpointChanged, CheckpointError, Closed
from ...memory.addresses import PAGE, buffer

if TYPE_CHECKING:
    import torch

DIRECT: int = getattr(os, "O_DIRECT", 0)
"""The flag for reads around the page cache; 0 where the system has none."""

_FADVISE = getattr(os, "posix_fadvise", None)  # not on macOS
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)
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


def rest(buffers: Sequence[Buffer], done: int) -> Sequence[Buffer]:
    """The buffers without their first ``done`` bytes."""
    if done == 0:
        return buffers
    left: list[Buffer] = []
    for memory in buffers:
        if done < len(memory):
            left.append(memoryview(memory).cast("B")[done:] if done else memory)
        done = max(0, done - len(memory))
    return left


@signals.held_throughout
class _Descriptors:
    """The files of this process that hold descriptors: at most a quarter of those that it may have.

    The rest is for others: the packages that read, sockets, the program itself.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: weakref.WeakSet[File] = weakref.WeakSet()

    def open(self, file: File, path: str) -> int:
        """A new descriptor for the file. Files that were not read for long give theirs up for it."""
        with self._lock:
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            while limit != resource.RLIM_INFINITY and len(self._files) >= max(1, limit // 4) and self._park_one():
                pass
            while True:
                try:
                    # O_NONBLOCK: opening a named pipe would wait for a writer for ever. For plain files it is nothing.
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._park_one():
                        raise
                else:
                    self._files.add(file)
                    return fd

    def forget(self, file: File) -> None:
        """The file holds no descriptor any more."""
        with self._lock:
            self._files.discard(file)

    def _park_one(self) -> bool:
        for file in sorted(self._files, key=lambda file: file.last_use):
            if file.park():
                self._files.discard(file)
                return True
        return False


_DESCRIPTORS = _Descriptors()
_uses = itertools.count()


@signals.held_throughout
class File:
    """An open file. The owner closes it.

    ``check`` compares identity, size and times with those at the opening. A rewrite in place that keeps the size,
    within the clock tick of the opening, is not seen.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._where = os.path.abspath(path)  # A relative path would lead elsewhere after a chdir.
        self._fd = -1
        self._direct_fd: int | None = None
        self._closed = False
        self._users = 0  # Methods that use a descriptor now; changes under the lock.
        self.last_use = 0
        # Cleared by the first direct read that is refused. The descriptor stays open until close: others may use it.
        self._direct_works = bool(DIRECT)
        self._lock = threading.Lock()
        try:
            self._fd = _DESCRIPTORS.open(self, path)
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte.
            raise CheckpointError(f"{path}: cannot be opened: {_why(path, error)}", cause="cannot_open") from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise CheckpointError(f"{path}: is {_kind(status.st_mode)}, not a file", cause="not_a_file")
        self._opened = _fingerprint(status)
        self.size = status.st_size
        self.modified = status.st_mtime_ns

    def pread(self, nbytes: int, offset: int) -> bytes:
        """Exactly ``nbytes`` from ``offset``, as bytes."""
        memory = bytearray(nbytes)
        if nbytes:
            self.read_into([memory], offset)
        return bytes(memory)

    def read_into(self, buffers: Sequence[Buffer], offset: int, ended: Callable[[], bool] = bool) -> None:
        """Fill the buffers in turn with the file's bytes from ``offset``. Short reads are finished.

        ``ended`` is for what waits longer than a disk does: it is not asked.
        """
        total = sum(map(len, buffers))
        done = self._preadv(buffers, offset)
        while done < total:
            if done == 0:
                raise self._short(offset)
            buffers, offset, total = rest(buffers, done), offset + done, total - done
            done = self._preadv(buffers, offset)

    def cached_into(self, buffers: Sequence[Buffer], offset: int) -> int:
        """Like ``read_into``, but reads only what the page cache holds, from the beginning; returns how many bytes."""
        total, done = sum(map(len, buffers)), 0
        cached = self._cached(offset, total)
        # A read that must not wait still starts the kernel's readahead, and then the disk reads those bytes twice.
        if cached is not None and 2 * cached < total:
            return 0
        if cached is not None and cached >= total:
            self.read_into(buffers, offset)
            return total
        while _NOWAIT and done < total:
            got = self._preadv(rest(buffers, done), offset + done, _NOWAIT)
            if got == 0:
                break
            done += got
        return done

    def _cached(self, offset: int, nbytes: int) -> int | None:
        """Bytes of the pages in this range that the page cache holds; ``None`` if the kernel does not say.

        Costs some microseconds.
        """
        asked, state = _CacheRange(offset, nbytes), _CacheState()
        fd = self._take()
        try:
            if nbytes == 0 or _libc.syscall(_CACHESTAT, fd, ctypes.byref(asked), ctypes.byref(state), 0):
                return None  # Older kernels do not have the call, and some sandboxes refuse it.
            return PAGE * int(state.cached)
        finally:
            self._give()

    def will_need(self, start: int, stop: int) -> None:
        """Let the kernel begin to read all of ``file[start:stop]``, if it is not cached.

        Its own readahead takes several threads that read one file for random reads, and goes in small steps.
        """
        cached = self._cached(start, stop - start)
        if _FADVISE is not None and cached is not None and 2 * cached < stop - start:
            fd = self._take()
            try:
                with contextlib.suppress(OSError):
                    _FADVISE(fd, start, stop - start, os.POSIX_FADV_WILLNEED)
            finally:
                self._give()

    def direct_into(self, memory: torch.Tensor, offset: int) -> bool:
        """Fill page-aligned ``memory`` from page-aligned ``offset`` around the page cache, up to the file's end.

        Returns ``False`` if this file system cannot, or gives less than a page at a time. ``memory`` is undefined then.
        """
        self._take()  # Its direct descriptor is given up with the other one.
        try:
            return self._direct_into(memory, offset)
        finally:
            self._give()

    def _direct_into(self, memory: torch.Tensor, offset: int) -> bool:
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
                    return False  # A buffered read will find out whether the file ends here.
        return True

    def check(self) -> None:
        """Raise ``CheckpointChanged`` if the path no longer leads to the file that was opened, unchanged."""
        try:
            on_disk = _fingerprint(os.stat(self._where))
        except OSError as error:
            raise self._gone(error) from error
        with self._lock:
            if self._closed:
                raise Closed(f"{self.path} was closed")
            try:
                opened = _fingerprint(os.fstat(self._fd)) if self._fd >= 0 else on_disk
            except OSError as error:
                raise self._failed(error, 0) from error
        self._compare(on_disk)  # First: one that was replaced has another change time, too.
        self._compare(opened)

    def _compare(self, now: tuple[int, ...]) -> None:
        for what, old, new in zip(_FINGERPRINT, self._opened, now, strict=True):
            if old != new:
                verb = "replaced" if what in ("device", "inode") else "changed"
                raise CheckpointChanged(
                    f"{self.path}: the file was {verb} after it was opened: its {what} was {old} and is {new}. "
                    "Load again when its writer is done"
                )

    def park(self) -> bool:
        """Give the descriptors up until the next use, unless they are in use now. Returns whether it did."""
        # Not waited for: whoever holds this lock may wait for a descriptor that is to come free here.
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self._users or self._fd < 0:
                return False
            self._let_go()
            return True
        finally:
            self._lock.release()

    def _take(self) -> int:
        """The descriptor, which is not parked before ``_give``."""
        with self._lock:
            if self._closed:
                raise Closed(f"{self.path} was closed")
            self.last_use = next(_uses)
            if self._fd < 0:
                self._reopen()
            self._users += 1
            return self._fd

    def _give(self) -> None:
        with self._lock:
            self._users -= 1

    def _reopen(self) -> None:
        try:
            fd = _DESCRIPTORS.open(self, self._where)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise self._gone(error) from error
            raise CheckpointError(
                f"{self.path}: cannot be opened again: {error.strerror}", cause="cannot_open"
            ) from error
        try:
            self._compare(_fingerprint(os.fstat(fd)))
        except BaseException:
            os.close(fd)
            _DESCRIPTORS.forget(self)
            raise
        self._fd = fd

    def _let_go(self) -> None:
        fds = (self._fd, self._direct_fd)
        # Forget before closing: the numbers may belong to another file at once, and a late thread would read that.
        self._fd, self._direct_fd = -1, None
        for fd in fds:
            if fd is not None and fd >= 0:
                with contextlib.suppress(OSError):  # Nothing was written, so nothing is lost; Linux has closed it.
                    os.close(fd)

    def close(self) -> None:
        """Close it. May be called twice."""
        with self._lock:
            self._closed = True
            self._let_go()
        _DESCRIPTORS.forget(self)

    def __repr__(self) -> str:
        return f"<File {self.path!r} {self.size} bytes{' closed' if self._closed else ''}>"

    def _preadv(self, buffers: Sequence[Buffer], offset: int, flags: int = 0) -> int:
        fd = self._take()
        try:
            return os.preadv(fd, buffers, offset, flags) if flags else os.preadv(fd, buffers, offset)
        except OSError as error:
            if flags and error.errno in _NOT_CACHED:
                return 0
            raise self._failed(error, offset) from error
        finally:
            self._give()

    def has_direct(self) -> bool:
        """Whether this file can be read around the page cache, as far as is known by now."""
        if self._closed:
            return False
        self._take()
        try:
            return self._open_direct() is not None
        finally:
            self._give()

    def _open_direct(self) -> int | None:
        with self._lock:
            if self._direct_fd is None and self._direct_works and self._fd >= 0:
                try:
                    # Through /proc: the path may lead to another file by now.
                    self._direct_fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC | DIRECT)
                except OSError:
                    self._direct_works = False  # tmpfs and some network file systems have no direct reads.
            return self._direct_fd if self._direct_works else None

    def _failed(self, error: OSError, offset: int) -> CheckpointError | Closed:
        if self._closed:
            return Closed(f"{self.path} was closed")
        return CheckpointError(f"{self.path}: reading at byte {offset} failed: {error.strerror}", cause="cannot_read")

    def _gone(self, error: OSError) -> CheckpointChanged:
        return CheckpointChanged(f"{self.path}: the file went away while it was open: {error.strerror}")

    def _short(self, offset: int) -> CheckpointChanged:
        return CheckpointChanged(f"{self.path}: ends at byte {offset}; {self.size} bytes were there when it was opened")


# The change time cannot be set by hand: it shows a writer who puts the modification time back, as rsync does.
_FINGERPRINT = ("device", "inode", "size", "modification time", "change time")


def _fingerprint(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def leads_nowhere(link: str | os.PathLike[str]) -> str:
    """What a link is that cannot be followed."""
    try:
        os.stat(link)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link that leads in a circle"
    return "a link that leads nowhere"


def _why(path: str, error: OSError | ValueError) -> str:
    if getattr(error, "errno", None) in (errno.ENOENT, errno.ELOOP) and os.path.islink(path):
        return leads_nowhere(path)
    return str(getattr(error, "strerror", error))


def _kind(mode: int) -> str:
    return "a directory" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
