"""ReadWriteLock: many readers or one writer, threads and tasks, with deadlines. WriteTurn: one update's hold on it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

import torch

from .. import signals
from ..errors import UsageError
from ..memory.devices import wait_for_all

_SLICE = 0.1  # seconds; signals that come while a thread waits are delivered this often
_READ = "the model is being read"


class StillRead(TimeoutError):
    """Readers did not leave a model within the time that was given."""


class Hold:
    """One reader's or writer's hold on a lock.

    Attributes:
        lock: the lock.
        loop: the thread whose event loop must go on for it to end; ``None`` where no loop ran.
        lasts: whether it has not ended; changes under the lock's condition.
    """

    def __init__(self, lock: ReadWriteLock) -> None:
        self.lock, self.lasts = lock, True
        self.loop = None if asyncio._get_running_loop() is None else threading.get_ident()


# What this task holds, or the thread where no task runs, and what those held that have started it: a task, or a thread
# by ``asyncio.to_thread``, begins with a copy. Whoever waits for its starter's hold to end would wait for itself.
_mine: ContextVar[tuple[Hold, ...]] = ContextVar("hotweights_holds", default=())


class ReadWriteLock:
    """Many readers, or one writer. A writer that waits goes before readers that come after it.

    Whoever would wait for itself gets a ``UsageError`` instead. A hold may end in another thread or task than it began.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # All of these change under the condition.
        self._readers: set[Hold] = set()
        self._waiting = 0  # writers
        self._writer: Hold | None = None
        self._open: int | None = None  # a thread that may read although somebody writes
        self._awaiting: list[asyncio.Future[None]] = []  # readers that are tasks; each waits in its own loop

    @signals.held
    def begin_reading(self, timeout: float | None) -> Hold:
        """From here on nobody writes, until ``end_reading``.

        Raises:
            TimeoutError: a writer did not let go within ``timeout`` seconds.
        """
        with self._changed:
            self._check_writer(blocks=True)
            # Behind a writer that waits for another task of this thread it would wait for ever: that task cannot run.
            if not any(map(_of_this_loop, self._readers)):
                self._wait(self._lets_in, timeout, self._why_shut)
            return self._enter()

    async def begin_reading_async(self, timeout: float | None, take: Callable[[Hold], None]) -> None:
        """``begin_reading`` for a task: others run while it waits. ``take`` gets the hold before a signal may come."""
        end = None if timeout is None else time.monotonic() + timeout
        while (changed := self._entered(take)) is not None:
            try:
                await asyncio.wait((changed,), timeout=_left(end, timeout, self._why_shut))
            finally:
                with self._changed, suppress(ValueError):
                    self._awaiting.remove(changed)

    @signals.watched
    def _entered(self, take: Callable[[Hold], None]) -> asyncio.Future[None] | None:
        """Enter; if that must wait, what is done when it may be tried again."""
        with self._changed:
            self._check_writer(blocks=False)
            if self._lets_in():
                take(self._enter())
                return None
            changed = asyncio.get_running_loop().create_future()
            self._awaiting.append(changed)
            return changed

    @signals.whole
    def end_reading(self, hold: Hold) -> None:
        """The end of one ``begin_reading``."""
        with self._changed:
            self._readers.discard(hold)
            self._end(hold)

    @contextmanager
    @signals.held
    def writing(self, timeout: float | None = None) -> Iterator[None]:
        """Inside, nobody else reads or writes."""
        hold = self.begin_writing(timeout)
        try:
            yield
        finally:
            self.end_writing(hold)

    @signals.held
    def begin_writing(self, timeout: float | None = None, *, of: float | None = None) -> Hold:
        """Enter ``writing``; ``end_writing`` leaves it. ``timeout`` is what is left ``of`` one for several waits.

        Raises:
            TimeoutError: readers did not leave within ``timeout`` seconds.
        """
        with self._changed:
            of = timeout if of is None else of
            self._refuse_own()
            self._waiting += 1
            try:
                try:
                    self._wait(self._is_free, timeout, lambda: _READ)
                except TimeoutError as error:
                    several = f"waited {of:g} seconds, all waits together: {_READ}"
                    raise StillRead(str(error) if of == timeout else several) from None
                self._writer = Hold(self)
            finally:
                self._waiting -= 1
                self._tell()
            return _noted(self._writer)

    def check_writable(self) -> None:
        """See that whoever writes here next need not wait for itself.

        Raises:
            UsageError: this thread or task reads or writes, or another task of its loop does.
        """
        with self._changed:
            self._refuse_own()

    @contextmanager
    @signals.held
    def writer_reads(self) -> Iterator[None]:
        """Inside, this thread may read although it writes: hooks and checks run in it."""
        self._let_in(threading.get_ident())
        try:
            yield
        finally:
            self._let_in(None)

    @signals.whole
    def _let_in(self, thread: int | None) -> None:
        with self._changed:
            self._open = thread

    @signals.whole
    def end_writing(self, hold: Hold) -> None:
        """Leave ``writing``: others are let in."""
        with self._changed:
            self._writer = None
            self._end(hold)

    # Under the condition.

    def _refuse_own(self) -> None:
        if self._own() or any(map(_of_this_loop, (*self._readers, self._writer))):
            raise _would_wait_for_itself(within=bool(self._own()))

    def _is_free(self) -> bool:
        return self._writer is None and not self._readers

    def _lets_in(self) -> bool:
        """Whether a reader may enter. A writer that waits goes first, unless it waits for this reader anyway."""
        if self._writer is not None:
            return self._open == threading.get_ident()
        return not self._waiting or bool(self._own())

    def _why_shut(self) -> str:
        """Why readers do not enter."""
        if self._writer is not None or not self._readers:
            return "an update is writing"
        return (
            f"an update waits until {len(self._readers)} of serving() that were entered before are left, and goes "
            "first; nothing is written yet. Where one of them waits for this thread: loop.run_in_executor starts one "
            "that is not within its task's serving(), asyncio.to_thread one that is"
        )

    def _check_writer(self, *, blocks: bool) -> None:
        """Refuse a reader that would wait for a writer that waits for it, or for the loop that it blocks."""
        if self._writer is None or self._lets_in():
            return
        if self._writer in self._own() or (blocks and _of_this_loop(self._writer)):
            raise UsageError(
                "this thread is writing the model; it cannot read it before it has committed. Where another task of "
                "it writes, use async with"
            )

    def _own(self) -> list[Hold]:
        return [hold for hold in _mine.get() if hold.lock is self and hold.lasts]

    @signals.held
    def _enter(self) -> Hold:
        hold = Hold(self)
        self._readers.add(hold)
        return _noted(hold)

    @signals.whole
    def _end(self, hold: Hold) -> None:
        hold.lasts = False
        _mine.set(tuple(other for other in _mine.get() if other.lasts))
        self._tell()

    @signals.whole
    def _tell(self) -> None:
        """Wake all who wait."""
        self._changed.notify_all()
        awaiting, self._awaiting = self._awaiting, []
        for changed in awaiting:
            with suppress(RuntimeError):  # Its loop was closed: nobody waits any more.
                changed.get_loop().call_soon_threadsafe(_wake, changed)

    @signals.held
    def _wait(self, ready: Callable[[], bool], timeout: float | None, why: Callable[[], str]) -> None:
        end = None if timeout is None else time.monotonic() + timeout
        while not ready():
            left = _left(end, timeout, why)
            self._changed.wait(_SLICE if left is None else min(left, _SLICE))
            signals.deliver()


def _left(end: float | None, timeout: float | None, why: Callable[[], str]) -> float | None:
    """How many seconds of the timeout are left."""
    left = None if end is None else end - time.monotonic()
    if left is not None and left <= 0:
        raise TimeoutError(f"waited {timeout:g} seconds: {why()}")
    return left


def _would_wait_for_itself(*, within: bool) -> UsageError:
    if within:
        return UsageError(
            "this thread reads the model within serving(), or what has started it does; it cannot update "
            "or roll back there. Leave serving() first"
        )
    return UsageError(
        "another task of this thread reads the model; it cannot wait for that. In a coroutine use "
        "await update_async(...) or await rollback_async()"
    )


@signals.whole
def _noted(hold: Hold) -> Hold:
    _mine.set((*(other for other in _mine.get() if other.lasts), hold))
    return hold


def _of_this_loop(hold: Hold | None) -> bool:
    return hold is not None and hold.loop == threading.get_ident()


def _wake(changed: asyncio.Future[None]) -> None:
    if not changed.done():  # It may have been cancelled, by its timeout for example.
        changed.set_result(None)


class WriteTurn:
    """One update's hold on the lock: taken at its first write, given back at its end.

    Attributes:
        waited: seconds that it waited for readers so far.
    """

    def __init__(
        self,
        lock: ReadWriteLock,
        timeout: float | None = None,
        note: Callable[[str, str, float], None] | None = None,
        devices: Callable[[], Collection[torch.device]] = tuple,
    ) -> None:
        """``timeout`` is how many seconds all its waits for readers may take; ``note`` is ``Timeline.note``.

        ``devices`` gives those on which the model lies.
        """
        self._lock, self._devices = lock, devices
        self._note = note
        self._hold: Hold | None = None
        self._writes = False
        self._left = self._whole = timeout
        self._since = 0.0
        self._before = 0.0
        self.waited = 0.0

    @property
    def held(self) -> bool:
        """Whether readers are kept out now."""
        return self._hold is not None

    @property
    def seconds(self) -> float:
        """For how long readers were kept out so far, in seconds."""
        return self._before + (time.perf_counter() - self._since if self.held else 0.0)

    @property
    def has_limit(self) -> bool:
        """Whether ``take`` may fail."""
        return self._left is not None

    @signals.held
    def take(self) -> None:
        """Wait until nobody reads, and what readers have queued on devices is done. May be called twice.

        Raises:
            TimeoutError: readers did not leave in time.
        """
        if self._writes:
            return
        was_held = self.held
        try:
            self._keep_out()
            wait_for_all(self._devices())
            self._writes = True
        except BaseException:  # Of a device, or an interruption: whoever called this has nothing to give back.
            if not was_held:
                self.give_back()
            raise

    @signals.held
    def _keep_out(self) -> None:
        if self._hold is None:
            began = time.perf_counter()
            self._hold = self._lock.begin_writing(self._left, of=self._whole)
            self._since = time.perf_counter()
            self.waited += self._since - began
            if self._note is not None:
                self._note("wait for readers", "", began)
            if self._left is not None:
                self._left = max(0.0, self._left - (self._since - began))

    @signals.whole
    def give_back(self) -> None:
        """Let readers in, when what was written lies there. May be called twice."""
        if self._hold is None:
            return
        try:
            if self._writes:
                wait_for_all(self._devices())
        finally:
            self._writes = False
            self._before, hold, self._hold = self.seconds, self._hold, None
            self._lock.end_writing(hold)

    @contextmanager
    @signals.held
    def briefly(self) -> Iterator[None]:
        """Inside, readers are kept out; afterwards it is as before. What they read is not written before ``take``."""
        was_held = self.held
        try:
            self._keep_out()  # An interruption may come when it was taken: nobody else would give it back.
            yield
        finally:
            if not was_held:
                self.give_back()
