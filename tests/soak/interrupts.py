"""Signals: real SIGINTs and SIGUSR1s at random moments of a live model's life; after each it is whole."""

import gc
import itertools
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from layers import WAYS, fault_of, live_model, numbers_in, streamed, version_of

import hotweights as hw

NAME, WEIGHT = "signals", 7
_STRIKER = Path(__file__).parent / "striker.py"
_OURS = str(Path(hw.__file__).parent)


class Blows:
    """The handler of both signals. Within ``struck`` a SIGINT raises, at most ``budget`` times; elsewhere nothing does.

    Attributes:
        came: signals that were handled within ``struck``.
        where: the lines of ours in which it raised.
        swallowed: interruptions that Python itself dropped, in a ``__del__`` for example.
    """

    def __init__(self, tally):
        self._tally = tally
        self.came = self.swallowed = self._budget = 0
        self.where = []

    def take(self, number, frame):
        frame = sys._getframe(1)  # Where it would be raised: what was held back comes with an older frame.
        lines, below = [], False
        while frame is not None and not below:
            code = frame.f_code
            if code is Blows.unraisable.__code__:  # Raised there, nobody would count it, nor what is counted there.
                return
            below = code is Blows.struck.__code__
            if code.co_filename.startswith(_OURS):
                lines.append(f"{code.co_filename[len(_OURS) + 1 :]}:{frame.f_lineno}")
            frame = frame.f_back
        if not below or sys._getframe(1).f_code is Blows.struck.__code__:
            return
        self.came += 1
        if number == signal.SIGINT and self._budget:
            self._budget -= 1
            self.where.append(" < ".join(lines[:4]))
            raise KeyboardInterrupt

    def struck(self, act, budget):
        """Run ``act`` under blows. Returns whether it was interrupted."""
        self._budget, self.where = budget, []
        try:
            act()
        except KeyboardInterrupt:
            return True
        return False

    def unraisable(self, what):
        if isinstance(what.exc_value, KeyboardInterrupt):
            self.swallowed += 1
        else:  # An object that was being made when it was interrupted cannot end.
            self._tally.fault(f"nobody could raise it: {what.object}, interrupted at {self.where}", what.exc_value)

    @contextmanager
    def falling(self, seed):
        """Inside, signals come; afterwards the handlers are those from before."""
        before = {number: signal.signal(number, self.take) for number in (signal.SIGINT, signal.SIGUSR1)}
        hook, sys.unraisablehook = sys.unraisablehook, self.unraisable
        striker = subprocess.Popen([sys.executable, "-S", str(_STRIKER), str(os.getpid()), seed])
        try:
            yield striker
        finally:
            striker.kill()
            striker.wait()
            for _ in range(100):  # What it sent last is handled by our handler, at one of these.
                os.getpid()
            sys.unraisablehook = hook
            for number, handler in before.items():
                signal.signal(number, handler)


# What is interrupted. Each takes a live model and the number of the new version.


def by_mapping(live, number):
    live.update(version_of(number), version=number)


def by_stream(live, number):
    live.update(streamed(number), version=number)


def by_pushes(live, number):
    with live.begin() as update:
        for pair in version_of(number).items():
            update.feed([pair])
        update.prepare()
        update.commit(number)


def by_nobody(live, number):
    with live.begin() as update:
        update.feed(version_of(number))


def by_checked(live, number):
    check = None if live._atomic is False else lambda model: numbers_in(model) == {float(number)}
    live.update(version_of(number), version=number, check=check)


def by_rollback(live, number):
    live.update(version_of(number), version=number)
    try:
        live.rollback()
    except hw.LiveModelError as error:  # Not every model keeps the version before.
        if "not kept" not in str(error) and live._atomic is not False:
            raise


def while_serving(live, number):
    with live.serving() as version:
        assert numbers_in(live.model) == {float(version)}


ACTS = (by_mapping, by_mapping, by_stream, by_pushes, by_nobody, by_checked, by_rollback, while_serving)


def run(tally, draw, until, folder):
    blows = Blows(tally)
    numbers = itertools.count(1)
    with blows.falling(str(draw.random())) as striker:
        models = {}
        while time.monotonic() < until:
            if striker.poll() is not None:
                raise KeyboardInterrupt
            atomic, keeps, budget = draw.choice(WAYS), draw.choice((False, True)), draw.choice((1, 1, 1, 2, 5))
            live = models.pop((atomic, keeps), None)
            if live is None or draw.random() < 0.01:
                live = _loaded(
                    tally, blows, live_model(atomic, keep_previous=keeps and atomic is not False), budget, numbers
                )
            elif not _updated(tally, blows, live, draw.choice(ACTS), budget, numbers):
                continue
            if live is None or not _goes_on(tally, live, numbers, draw.random() < 0.2):
                continue  # After a fault there is a new model: one fault is one.
            models[atomic, keeps] = live
    tally.add("dropped by Python", blows.swallowed)


def _loaded(tally, blows, live, budget, numbers):
    number = next(numbers)
    if not _struck(
        tally,
        blows,
        f"load, {live._atomic}, at most {budget} times",
        lambda: live.load(version_of(number), version=number),
        budget,
    ):
        return None
    tally.add("first loads")
    if live.state is hw.State.EMPTY:
        if live.version is not None:
            tally.fault(f"{live!r} is empty and has a version; {blows.where}")
        live.load(version_of(number), version=number)
    return live


def _updated(tally, blows, live, act, budget, numbers):
    before, number, atomic = live.version, next(numbers), live._atomic
    what = f"{act.__name__}, {atomic}, at most {budget} times"
    if not _struck(tally, blows, what, lambda: act(live, number), budget):
        return False
    tally.add("updates")
    wrong = fault_of(live)
    if live.version not in (before, number):
        wrong = f"{live!r} came from {before} and was to be {number}"
    if live.state is hw.State.TORN and atomic is not False:
        wrong = f"{live!r} is torn"
    if wrong:
        tally.fault(f"{what}: {wrong}; interrupted at {blows.where}")
    return not wrong


def _struck(tally, blows, what, act, budget):
    """Run it under blows. Returns whether nothing but an interruption came of it."""
    came, swallowed = blows.came, blows.swallowed
    try:
        interrupted = blows.struck(act, budget)
    except BaseException as error:
        tally.fault(f"{what}, interrupted at {blows.where}", error)
        return False
    finally:
        tally.add("signals", blows.came - came)
    tally.add("interruptions", len(blows.where))
    if blows.where and not interrupted and blows.swallowed == swallowed:
        tally.fault(f"{what}: an interruption was swallowed at {blows.where}")
        return False
    return _is_as_before(tally, blows, what)


def _is_as_before(tally, blows, what):
    handlers = {signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    if gc.isenabled() and torch.is_grad_enabled() and handlers == {blows.take} and not blocked:
        return True
    state = f"collector {gc.isenabled()}, autograd {torch.is_grad_enabled()}, handlers {handlers}, blocked {blocked}"
    tally.fault(f"{what}: {state}; interrupted at {blows.where}")
    gc.enable()
    torch.set_grad_enabled(True)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, blows.take)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return False


def _goes_on(tally, live, numbers, also_update):
    """Whether nobody holds a lock and the next update works."""
    number = next(numbers)
    try:
        if live.state is hw.State.TORN or also_update:
            live.update(version_of(number), version=number)
            tally.add("updates in peace")
        with live.serving(timeout=10):
            wrong = fault_of(live)
    except BaseException as error:
        tally.fault("after signals", error)
        return False
    if wrong:
        tally.fault(f"after signals: {wrong}")
    return not wrong
