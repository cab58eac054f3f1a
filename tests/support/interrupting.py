"""Real signals at chosen lines of ours, deterministically."""

import collections
import itertools
import os
import signal
import sys

import hotweights as hw

OURS = os.path.dirname(hw.__file__) + os.sep


def is_ours(frame):
    """Whether its lines count. What raises in a ``__del__`` is swallowed, by Python."""
    if not frame.f_code.co_filename.startswith(OURS):
        return False
    for _ in range(8):
        if frame is None:
            return True
        if frame.f_code.co_name == "__del__":
            return False
        frame = frame.f_back
    return True


def place_of(frame):
    """A line, and the line of ours that called it."""
    caller = frame.f_back
    while caller is not None and not caller.f_code.co_filename.startswith(OURS):
        caller = caller.f_back
    return frame.f_code, frame.f_lineno, *((caller.f_code, caller.f_lineno) if caller else ())


class Tracing:
    """What looks at every line of ours that this thread runs inside."""

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *error):
        sys.settrace(None)


class Interrupting(Tracing):
    """Raises a real SIGINT in this thread at the ``at``-th line of ours that is run inside, while it is armed.

    Attributes:
        armed: whether lines count.
        where: that line; ``None`` if there were not so many.
    """

    def __init__(self, at, *, armed=True, place=None):
        """With a ``place`` only its lines count."""
        self.left, self.armed, self.place, self.where = at, armed, place, None

    def trace(self, frame, event, argument):
        if self.place is not None and frame.f_code is not self.place[0]:
            return None
        if not is_ours(frame):
            return None
        if event == "line" and self.armed and self.where is None and self.place in (None, place_of(frame)):
            if self.left == 0:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                signal.raise_signal(signal.SIGINT)
            self.left -= 1
        return self.trace


class Recording(Tracing):
    """How often each place is run inside."""

    def __init__(self):
        self.times = collections.Counter()

    def trace(self, frame, event, argument):
        if not is_ours(frame):
            return None
        if event == "line":
            self.times[place_of(frame)] += 1
        return self.trace


def at_every(step):
    """An ``Interrupting`` for every so many-th line, and at last one that comes after the end."""
    for at in itertools.count(step=step):
        interrupting = Interrupting(at)
        yield interrupting
        if interrupting.where is None:
            return


def at_every_place(act):
    """An ``Interrupting`` for every place that ``act`` runs, where it is run first and where it is run last."""
    with Recording() as recording:
        act()
    for place, times in recording.times.items():
        for at in sorted({0, times - 1}):
            yield Interrupting(at, place=place)
