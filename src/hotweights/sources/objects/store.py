"""Store: asks one store for ranges of objects, many at once, again when that fails, and never longer than a deadline.

The requests run in one thread's event loop, so that each wait can be ended: by a deadline, by ``close``, by whoever
asked. The threads that ask wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future, wait
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, TypeVar

from ... import signals
from ...errors import CheckpointChanged, CheckpointError, Closed, StoreError, UsageError
from ..files.file import Buffer
from .cache import BLOCK, Cache
from .service import NOTHING, Pin, Refusal, Service, package_error

T = TypeVar("T")

PART = 8 * 1024 * 1024
"""Bytes of one request at most."""
HEAD = 64 * 1024
"""Bytes that are read when an object is opened: the header of most files lies in them."""
_ASK = 0.1  # seconds after which a wait asks whether it has ended
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0  # seconds between two tries; each is about twice the one before
_LOGIN = "give it a store that has some"
_SLOWEST = 1024 * 1024  # bytes in a second, at which an upload still counts as one that goes on
_LOGINS = 3  # tries after which credentials that worked before count as expired


# The threads of the package that asks are not in a forked child, and whoever asks there waits for ever.
_process: int | None = None  # which first asked; set once
_FORKED = (
    "{}: this process was forked from one that had asked stores, and cannot; start it otherwise, by "
    'multiprocessing.get_context("spawn")'
)


class Opened:
    """What the first request for an object brought: which object it is, and its first bytes."""

    __slots__ = ("pin", "start")

    def __init__(self, pin: Pin, start: bytes) -> None:
        self.pin = pin
        self.start = start


class _Asked(Generic[T]):
    """Work that was given to the loop's thread. ``answer`` is set when it has ended, and touches nothing any more."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self.answer: Future[T] = Future()
        self._work = work
        self._task: asyncio.Task[T] | None = None

    def begin(self) -> None:
        """In the loop's thread."""
        self._task = asyncio.get_running_loop().create_task(self._work)
        self._task.add_done_callback(self._end)

    def cancel(self) -> None:
        """In the loop's thread."""
        if self._task is not None:
            self._task.cancel()

    def _end(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self.answer.set_exception(Closed("the store was closed while it was asked"))
        elif (error := task.exception()) is not None:
            self.answer.set_exception(error)
        else:
            self.answer.set_result(task.result())


@signals.held_throughout
class Store:
    """A connection to one store. Any thread may ask. The owner closes it.

    Args:
        service: the store.
        shown: how messages name what lies in it, up to the key; without credentials.
        deadline: seconds in which something of each range must come, all tries together. A range that comes bit by bit
            gets them anew with each.
        requests: how many at once.
        login: what to do where credentials are refused.
    """

    def __init__(
        self, service: Service, shown: str, *, deadline: float = 60.0, requests: int = 16, login: str = _LOGIN
    ) -> None:
        self.shown = shown
        self.login = login
        self.deadline = deadline
        self.requests = requests
        self.cache: Cache | None = None  # Whoever makes the store may give it one, before it is asked.
        self._service = service
        global _process
        _process = _process or os.getpid()
        self._process = os.getpid()
        if _process != self._process:
            raise UsageError(_FORKED.format(shown))
        self._answered = False  # Whether it ever gave bytes: credentials were good then. Changes in the loop's thread.
        self._lock = threading.RLock()
        # These change under the lock.
        self._closed = False
        self._soon: dict[str, _Asked[Opened]] = {}
        self._loop = asyncio.new_event_loop()
        self._free = asyncio.Semaphore(requests)
        self._free_blocks = asyncio.Semaphore(requests)
        self._blocks: dict[tuple[str, Pin, int], asyncio.Task[memoryview]] = {}  # under way; in the loop's thread
        self._thread = threading.Thread(target=self._run, name="hotweights-objects", daemon=True)
        self._thread.start()

    def path(self, key: str) -> str:
        """The address of a key, for people."""
        return f"{self.shown}/{key}" if key else self.shown

    def open_soon(self, keys: Iterable[str]) -> None:
        """Begin to open objects, all at once."""
        with self._lock:
            for key in keys:
                if key not in self._soon:
                    self._soon[key] = self._ask(self._open(key))

    def forget(self) -> None:
        """Forget what was begun to open, and not taken."""
        with self._lock:
            self._soon.clear()

    def there(self, key: str) -> bool:
        """Whether there is such an object. It is opened for that, and ``opened`` takes it."""
        self.open_soon([key])
        try:
            self._wait(self._soon[key])
        except FileNotFoundError:
            return False
        return True

    def opened(self, key: str) -> Opened:
        """Open an object, or take what was begun by ``open_soon``.

        Raises:
            CheckpointError: there is no such object.
            StoreError: the store did not give it.
        """
        self.open_soon([key])
        with self._lock:
            begun = self._soon.pop(key)
        with contextlib.suppress(FileNotFoundError):  # Its text quotes the address, and what stood in the answer.
            return self._wait(begun)
        raise CheckpointError(f"{self.path(key)}: there is no such object", cause="not_found")

    def names(self, key: str) -> list[str]:
        """The names of what lies directly below a key."""
        return self._wait(self._ask(self._tries(f"{self.path(key)}: its list", lambda: self._service.names(key))))

    def below(self, key: str) -> dict[str, Pin]:
        """Every object below a key, by what its key has after that."""
        return self._wait(self._ask(self._tries(f"{self.path(key)}: its list", lambda: self._service.below(key))))

    def head(self, key: str) -> Pin:
        """The object as it is now. ``FileNotFoundError`` if there is none."""
        return self._wait(self._ask(self._tries(self.path(key), lambda: self._service.head(key))))

    def read(self, key: str, pin: Pin, buffers: Sequence[Buffer], start: int, ended: Callable[[], bool] = bool) -> None:
        """Fill the buffers in turn with the object's bytes from ``start`` on.

        Raises:
            CheckpointChanged: it is not the object that was opened; some bytes are written.
            StoreError: the store did not give it in time; some bytes are written.
            Closed: the store was closed, or ``ended`` said true.
        """
        self._wait(self._ask(self._read(key, pin, _Places(buffers), start)), ended)

    def content(self, key: str) -> tuple[bytes, Pin] | None:
        """All of a small object, and which it is; ``None`` if there is none."""
        try:
            opened = self._wait(self._ask(self._open(key)))
        except FileNotFoundError:
            return None
        content = bytearray(opened.pin.size)
        content[: len(opened.start)] = opened.start
        if len(content) > len(opened.start):
            self.read(key, opened.pin, [memoryview(content)[len(opened.start) :]], len(opened.start))
        return bytes(content), opened.pin

    def put(self, key: str, content: Path | bytes, mode: object) -> dict[str, str]:
        """Write an object, whole or not at all, see ``Service.put``. Errors are those of its package."""
        nbytes = len(content) if isinstance(content, bytes) else content.stat().st_size
        # Whether a part of it has arrived is not seen: the package tries each again, and says when it gives up.
        patience = self.deadline + nbytes / _SLOWEST
        return self._wait(self._ask(self._within(patience, self._service.put(key, content, mode))))

    def delete(self, key: str) -> None:
        """Delete an object. Errors are those of its package."""
        self._wait(self._ask(self._within(self.deadline, self._service.delete(key))))

    def close(self) -> None:
        """End every request and every wait. May be called twice."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed and self._process == os.getpid():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    # What the threads do that ask.

    def _ask(self, work: Coroutine[Any, Any, T]) -> _Asked[T]:
        asked = _Asked(work)
        with self._lock:  # ``close`` stops the loop behind whatever was given to it.
            if self._closed or self._process != os.getpid():
                work.close()
                if self._closed:
                    raise Closed(f"{self.shown} was closed")
                raise UsageError(_FORKED.format(self.shown))
            self._loop.call_soon_threadsafe(asked.begin)
        return asked

    def _wait(self, asked: _Asked[T], ended: Callable[[], bool] = bool) -> T:
        try:
            while not wait([asked.answer], timeout=_ASK).done:
                signals.deliver()
                if ended():
                    raise Closed("the reading was stopped")
        except BaseException:
            # Not before it has ended: it writes into memory that is the caller's.
            with self._lock:
                if not self._closed:
                    self._loop.call_soon_threadsafe(asked.cancel)
            wait([asked.answer])
            raise
        return asked.answer.result()

    # What happens in the loop's thread.

    def _run(self) -> None:
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self._loop.run_until_complete(asyncio.wait(tasks))
        for asked in self._soon.values():  # Nobody took them: an error of one is nobody's.
            asked.answer.exception()
        self._loop.close()

    async def _open(self, key: str) -> Opened:
        async def first() -> Opened:
            try:
                body = await self._service.get(key, 0, HEAD, None)
            except Exception as error:
                if not package_error(error) or not Refusal.of(error).beyond:
                    raise
                return Opened(await self._service.head(key), b"")  # An empty object has no range.
            start = b"".join([chunk async for chunk in body.chunks])
            if len(start) != min(HEAD, body.pin.size):
                raise ValueError(f"{len(start)} bytes, another number than was asked for")
            return Opened(body.pin, start)

        opened = await self._tries(self.path(key), first)
        self._answered = True
        return opened

    async def _within(self, seconds: float, work: Coroutine[Any, Any, T]) -> T:
        async with asyncio.timeout(seconds):
            return await work

    async def _tries(self, what: str, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Ask until there is an answer."""
        tries = _Tries(self, what)
        while True:
            try:
                async with self._free, asyncio.timeout(tries.patience()):
                    return await ask()
            except FileNotFoundError:
                raise
            except Exception as error:
                if not package_error(error):
                    raise
                refusal = Refusal.of(error)
            await asyncio.sleep(tries.pause(refusal, self._answered))

    async def _read(self, key: str, pin: Pin, places: _Places, start: int) -> None:
        stop = start + places.nbytes
        cache = self.cache if self.cache is not None and self.cache.holds(pin) else None
        try:
            async with asyncio.TaskGroup() as group:
                if cache is None:
                    for first in range(start, stop, PART):
                        group.create_task(self._part(key, pin, places, start, first, min(first + PART, stop)))
                else:
                    for number in range(start // BLOCK, -(-stop // BLOCK)):
                        group.create_task(self._block(cache, key, pin, places, start, number))
        except BaseExceptionGroup as errors:
            error = errors.exceptions[0]
        else:
            self._answered = True
            return
        raise error

    async def _block(self, cache: Cache, key: str, pin: Pin, places: _Places, base: int, number: int) -> None:
        """Take what is wanted of one block of the cache. Two who want it at once ask once."""
        which = key, pin, number
        if which not in self._blocks:
            self._blocks[which] = task = self._loop.create_task(self._whole_block(cache, key, pin, number))
            task.add_done_callback(lambda task: self._got_block(which, task))
        block = await asyncio.shield(self._blocks[which])
        first = number * BLOCK
        start, stop = max(first, base), min(first + len(block), base + places.nbytes)
        places.put(start - base, block[start - first : stop - first])

    def _got_block(self, which: tuple[str, Pin, int], task: asyncio.Task[memoryview]) -> None:
        del self._blocks[which]
        if not task.cancelled():
            task.exception()  # Whoever waited was told, if somebody still does.

    async def _whole_block(self, cache: Cache, key: str, pin: Pin, number: int) -> memoryview:
        first, last = number * BLOCK, min((number + 1) * BLOCK, pin.size)

        async def read() -> bytearray:
            block = bytearray(last - first)
            await self._part(key, pin, _Places([block]), first, first, last)
            return block

        async with self._free_blocks:  # Each is in memory whole.
            return await cache.block(self.path(key), pin, number, read, self.deadline)

    async def _part(self, key: str, pin: Pin, places: _Places, base: int, start: int, stop: int) -> None:
        """Read one range, each try from where the last one ended."""
        path = self.path(key)
        tries = _Tries(self, f"{path} bytes {start}..{stop}")
        refusal: Refusal | None
        while start < stop:
            try:
                async with self._free, asyncio.timeout(tries.patience()) as limit:
                    body = await self._service.get(key, start, stop, pin)
                    if changed := pin.changed(body.pin):
                        raise CheckpointChanged(f"{path}: the object was replaced after it was opened: {changed}")
                    async for chunk in body.chunks:
                        if start + len(chunk) > stop:
                            raise ValueError("more than was asked for")
                        places.put(start - base, chunk)
                        start += len(chunk)
                        tries.progress()
                        limit.reschedule(self._loop.time() + tries.patience())
                refusal = Refusal(f"a body that ended {stop - start} bytes early", again=True)
            except FileNotFoundError:
                refusal = None
            except Exception as error:
                if not package_error(error):
                    raise
                refusal = Refusal.of(error)
            if refusal is None:
                raise CheckpointChanged(f"{path}: the object went away while it was open")
            if start < stop:
                await asyncio.sleep(tries.pause(refusal, self._answered))


class _Tries:
    """How often one thing was asked for, how long that may go on, and what is said when it may not."""

    def __init__(self, store: Store, what: str) -> None:
        self._deadline = store.deadline
        self._login = store.login
        self._what = what
        self._count = 0
        self._answer = ""
        self._since: float | None = None  # the first try, or the last bytes that came

    def progress(self) -> None:
        """Something came."""
        self._count, self._since = 0, _now()

    def patience(self) -> float:
        """Seconds for which the next step may bring nothing: half of the deadline, so that there is a second try."""
        if self._since is None:
            self._since = _now()
        return max(0.001, min(self._deadline / 2, self._since + self._deadline - _now()))

    def pause(self, refusal: Refusal, answered: bool) -> float:
        """Seconds to wait before the next try. Raises ``CheckpointError`` if there is none."""
        self._count += 1
        if refusal is not NOTHING or not self._answer:  # The last try may have had no time for an answer.
            self._answer = refusal.answer
        said, what = self._answer, self._what
        tries = f" ({self._count} tries)" if self._count > 1 else ""
        if refusal.replaced:
            raise CheckpointChanged(f"{what}: the object was replaced after it was opened; the store said {said}")
        if refusal.ignores_ranges:
            raise StoreError(
                f"{what}: this store sends {said}, so parts cannot be read; download it, and give the folder"
            )
        if refusal.login and not (answered and self._count < _LOGINS):
            cure = "they have expired, perhaps" if answered else self._login
            raise StoreError(f"{what}: the store refused the credentials, or asks for some: {said}{tries}; {cure}")
        if not refusal.again and not refusal.login:
            raise StoreError(f"{what}: the store refused: {said}{tries}")
        assert self._since is not None
        left = self._since + self._deadline - _now()
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(self._count - 1, 10))
        pause *= random.uniform(0.5, 1)  # Without chance all readers would come back at once.
        if pause >= left:
            raise StoreError(
                f"{what}: not to be had within {self._deadline:g} s; {self._count} tries, the last answer: {said}. "
                f'store={{"deadline": seconds}} waits longer'
            )
        return float(pause)


def _now() -> float:
    return time.monotonic()


class _Places:
    """Where the bytes of one read go: buffers in turn."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self._views = [memoryview(memory).cast("B") for memory in buffers]
        self._ends = list(accumulate(len(view) for view in self._views))
        self.nbytes = self._ends[-1] if self._ends else 0

    def put(self, position: int, chunk: bytes | memoryview) -> None:
        """Write ``chunk``, whose first byte has this position among all of them."""
        rest = memoryview(chunk)
        place = bisect_right(self._ends, position)
        while rest:
            view = self._views[place]
            first = position - (self._ends[place] - len(view))
            size = min(len(rest), len(view) - first)
            view[first : first + size] = rest[:size]
            rest, position, place = rest[size:], position + size, place + 1
