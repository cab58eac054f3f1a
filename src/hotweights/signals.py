"""Signals: Ctrl-C and the like wait while something runs that may not be cut short.

``held``, ``whole`` and ``watched`` mark the functions that take and give back locks, change states, commit, abort and
put things back. ``first_waits`` is for a wait that a signal ends, and for what follows from it. ``Stop`` stops another
thread at the places where signals are delivered.
"""

from __future__ import annotations

# Not those of `signal`: they make enums of what they return, slowly, and in lines that belong to no function of ours.
import _signal  # type: ignore[import-not-found]
import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType
from typing import Any, TypeVar

# What must be whole. While somebody watches, the handlers of signals look at what they interrupt: code that is marked
# here is finished first. `finally` alone does not do that: a signal may come at its first line, or at the first
# instruction of an `__exit__`, and then what it should give back is never given back.

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Class = TypeVar("_Class", bound=type)
_Result = TypeVar("_Result")

_HELD: set[CodeType] = set()
_WHOLE: set[CodeType] = set()
# Frames in files that end so belong to the code that calls them. Of torch: what turns autograd and autocast off.
_PASSED_OVER = (
    contextlib.__file__,
    threading.__file__,
    signal.__file__,
    "/torch/autograd/grad_mode.py",
    "/torch/amp/autocast_mode.py",
)


def held(function: _Function) -> _Function:
    """Mark a function: a signal that comes in its own lines waits, one that comes in what it calls does not.

    What waits is delivered by ``deliver``, or when nobody watches any more: where it may be raised.
    """
    _HELD.add(function.__code__)
    return function


def held_throughout(kind: _Class) -> _Class:
    """Mark all methods of a class as ``held``: one that takes locks of its own."""
    _HELD.update(member.__code__ for member in vars(kind).values() if isinstance(member, FunctionType))
    return kind


def whole(function: _Function) -> _Function:
    """Mark a function: signals that come in it, and in all that it calls, wait, as those that are ``held`` do."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        finally:
            if not _watch.watchers:  # The function ended the watching: nobody else will deliver.
                _deliver_signals()  # No ``Stop``: its caller may hold what it does not know of yet.

    # Who reads a traceback, and who looks for a ``__del__`` in one, knows it by the function's name.
    run.__code__ = run.__code__.replace(co_name=function.__name__)  # type: ignore[attr-defined]
    _WHOLE.add(function.__code__)
    _HELD.add(run.__code__)  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


def watched(function: _Function) -> _Function:
    """Mark a function during which signals are watched; its own lines are ``held``."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        watcher = watch()
        try:
            return function(*arguments, **options)
        finally:
            unwatch(watcher)

    _HELD.update((function.__code__, run.__code__))  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


def watch() -> object:
    """Watch signals from here on; give what this returns to ``unwatch``. Does nothing outside the main thread."""
    return _watch.begin() if _in_main_thread() else None


def unwatch(watcher: object) -> None:
    """The end of one ``watch``, in any thread. Delivers what waits, if nobody else watches."""
    _watch.end(watcher)


class Stopped(BaseException):
    """What is raised into work that was asked to stop. No failure of the work: whoever asked catches it."""


class Stop:
    """What stops work in another thread, as Ctrl-C stops it in the main thread: where ``deliver`` is called."""

    def __init__(self) -> None:
        self.asked = False
        self.begun = False  # Set before ``asked`` is looked at: work that has not begun never will, once it was asked.

    def run(self, work: Callable[[], _Result]) -> _Result:
        """Do the work in this thread.

        Raises:
            Stopped: ``asked`` was set, by another thread, before the work had ended.
        """
        self.begun = True
        before, _thread.stop = _thread.stop, self
        try:
            deliver()
            return work()
        finally:
            _thread.stop = before


class _Stoppable(threading.local):
    """What may stop this thread."""

    stop: Stop | None = None


_thread = _Stoppable()


def deliver() -> None:
    """Deliver the signals that wait, as far as nothing that is whole runs: their handlers may raise here."""
    if (stop := _thread.stop) is not None and stop.asked and not _is_whole(sys._getframe()):
        stop.asked = False  # What is put back now, and may call this, is not stopped too.
        raise Stopped
    _deliver_signals()


def _deliver_signals() -> None:
    if _watch.pending and _in_main_thread() and not _is_whole(sys._getframe()):
        _watch.deliver()


class Interruption:
    """The signals that wait for the end of one ``first_waits``. Only the handler adds some."""

    def __init__(self, wake: Callable[[], object]) -> None:
        self.numbers: set[int] = set()
        self.wake = wake

    @property
    def came(self) -> bool:
        """Whether a signal came."""
        return bool(self.numbers)


@contextmanager
@held
def first_waits(wake: Callable[[], object]) -> Iterator[Interruption]:
    """Inside, the first signal of each kind waits for the end of the ``with``, in code of the user too.

    A second one does not: it is handled as elsewhere while somebody watches.

    Args:
        wake: called by the handler when a signal comes, to end a wait.
    """
    interruption = Interruption(wake)
    if not _in_main_thread():
        yield interruption
        return
    watcher = watch()
    try:
        _watch.postpone(interruption)
        yield interruption
    finally:
        _watch.settle(interruption)
        unwatch(watcher)
        deliver()  # Others may watch still.


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # No handler ever runs in another one.


class _Watch:
    """The handlers of this process while somebody watches."""

    def __init__(self) -> None:
        self.pending: set[int] = set()
        self.watchers: set[object] = set()  # Adding and discarding are atomic: updates may end in any thread.
        self.interruptions: list[Interruption] = []  # of the main thread, the innermost last
        self._ending = False  # whether handlers are being put back
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def begin(self) -> object:
        watcher = object()
        blocked = _signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            # One that is not watched yet could raise, and one more in the lines that take back what was begun.
            _signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)
            for number in _NUMBERS:
                handler = _signal.getsignal(number)
                if callable(handler) and handler != self.take:
                    self._before[number] = handler
                    _signal.signal(number, self.take)
            self.watchers.add(watcher)
        finally:
            _signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return watcher

    def end(self, watcher: object) -> None:
        if not _in_main_thread():  # No handler runs here, and ``_ending`` is the main thread's.
            self.watchers.discard(watcher)
            return
        self._ending = True
        self.watchers.discard(watcher)
        if not self.watchers:
            try:
                self._put_back()
            finally:  # A handler that is back may raise in the midst of it: put back the rest.
                self._ending = False
                self._put_back()
        self._ending = False
        if not self.watchers:
            _deliver_signals()

    def _put_back(self) -> None:
        blocked = _signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            _signal.pthread_sigmask(signal.SIG_BLOCK, self._before)
            for number, handler in self._before.items():
                if _signal.getsignal(number) == self.take:  # Nobody put another one there meanwhile.
                    _signal.signal(number, handler)
        finally:
            _signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def take(self, number: int, frame: FrameType | None) -> None:
        if self.interruptions and number not in self.interruptions[-1].numbers:
            self.interruptions[-1].numbers.add(number)
            self.interruptions[-1].wake()
        elif (self.watchers or self._ending) and _must_finish(frame):
            self.pending.add(number)  # Not the frame: it would keep alive what it holds, an update say.
        else:
            self._before[number](number, frame)

    def postpone(self, interruption: Interruption) -> None:
        self.interruptions.append(interruption)
        while self.pending:  # They came in the lines just before.
            interruption.numbers.add(self.pending.pop())

    def settle(self, interruption: Interruption) -> None:
        self.interruptions.remove(interruption)
        self.pending |= interruption.numbers

    def deliver(self) -> None:
        while self.pending:
            number = self.pending.pop()
            self._before[number](number, sys._getframe())


def _must_finish(frame: FrameType | None) -> bool:
    """Whether what a signal interrupts is whole, or held in its own lines."""
    tracer = getattr(sys.gettrace(), "__code__", None)
    if frame is not None and frame.f_code is tracer:  # A debugger or a test, which looks at the next frame.
        frame = frame.f_back
    caller = frame
    while caller is not None and caller.f_code.co_filename.endswith(_PASSED_OVER):
        caller = caller.f_back
    return (caller is not None and caller.f_code in _HELD) or _is_whole(frame)


def _is_whole(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code in _WHOLE:
            return True
        frame = frame.f_back
    return False


_NUMBERS = sorted(signal.valid_signals())
_watch = _Watch()
_HELD.update(
    function.__code__
    for function in (watch, unwatch, deliver, _deliver_signals, _in_main_thread, _must_finish, _is_whole)
)
_HELD.update(
    method.__code__
    for method in (_Watch.begin, _Watch.end, _Watch.take, _Watch.postpone, _Watch.settle, _Watch.deliver)
)
_WHOLE.add(_Watch._put_back.__code__)
