"""Processes that die when a test says so: at the k-th point of an update, a message or a decision. No sleeps."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
from unittest import mock

import torch
from ends import TIMEOUT, receiver, sender
from torch import nn

import hotweights as hw
from hotweights.transfer.ballot import Ballot
from hotweights.transfer.channel import Channel

context = multiprocessing.get_context("fork")
# Before any fork: else each child imports it anew, and waits for ever for what a thread of its parent was importing.
PUBLIC = [getattr(hw, name) for name in hw.__all__]


class Killer:
    """Kills this process at its ``at``-th point; the points are before and after each word, and after each heard."""

    def __init__(self, at, decided=None):
        self._left = at
        self._armed = False
        self._decided = decided

    def arm(self, armed=True):
        self._armed = armed

    def point(self):
        if self._armed:
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self._left -= 1

    def around(self, function):
        def wrapped(*arguments, **options):
            self.point()
            result = function(*arguments, **options)
            self.point()
            return result

        return wrapped

    def after(self, function):
        def wrapped(*arguments, **options):
            result = function(*arguments, **options)
            if result is not None:
                self.point()
            return result

        return wrapped

    def noting(self, decide):
        def wrapped(ballot, vote):
            written = decide(ballot, vote)
            if self._armed and self._decided is not None:
                self._decided.value = written.value
            return written

        return wrapped

    def __enter__(self):
        self._patches = [
            mock.patch.object(Channel, "send", self.around(Channel.send)),
            mock.patch.object(Channel, "read", self.after(Channel.read)),
            mock.patch.object(Ballot, "decide", self.around(self.noting(Ballot.decide))),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *error):
        for patch in self._patches:
            patch.stop()


class Child:
    """A forked process and a pipe to it; it must end before its deadline. Use it in a ``with``.

    With ``fresh`` it is a new one instead, which has none of this process's libraries.
    """

    def __init__(self, work, *arguments, fresh=False):
        context = multiprocessing.get_context("spawn" if fresh else "fork")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(work, theirs, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.name = f"process {self.process.pid}"

    def heard(self, timeout=TIMEOUT):
        """What it says next; ``None`` if it ended instead."""
        ready = multiprocessing.connection.wait([self._pipe, self.process.sentinel], timeout)
        assert ready, "it waits for ever"
        try:
            said = self._pipe.recv() if self._pipe.poll() else None
        except (EOFError, ConnectionResetError):  # The latter if it was killed with something unread.
            return None
        if isinstance(said, Exception):
            raise said
        return said

    def say(self, word):
        self._pipe.send(word)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if error[0] is not None:
            self.process.kill()
        self.process.join(TIMEOUT)
        assert not self.process.is_alive(), "it does not end"
        self.exitcode = self.process.exitcode
        self.process.close()
        self._pipe.close()


def _run(work, pipe, arguments):
    torch.set_num_threads(1)
    try:
        work(pipe, *arguments)
    except Exception as error:
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


class Tiny(nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        self.one = nn.Parameter(torch.full((300, 10), float(value)), requires_grad=False)
        self.two = nn.Parameter(torch.full((7,), float(value)).bfloat16(), requires_grad=False)


def value_of(model):
    """The value that all of the model has; it fails where it is of two versions."""
    (value,) = {value for tensor in model.state_dict().values() for value in tensor.float().unique().tolist()}
    return value


def follow(pipe, address, at=None, atomic="journal", model=Tiny):
    """Take versions until the third; after each attempt, say what is live. A killer is armed after the first."""
    live = hw.LiveModel(model(), atomic=atomic)
    with receiver(address) as source, Killer(-1 if at is None else at) as killer:
        while live.version != 3:
            said = ""
            try:
                live.load(source) if live.version is None else live.update(source)
            except hw.UpdateAborted as error:
                said = f"{error}: {error.__cause__}"
            pipe.send((live.version, value_of(live.model), said))
            killer.arm(at is not None and source.version == 1)
        killer.arm(False)


def send_twice(pipe, address, at, decided, **options):
    """Send version 1, then version 2 with a killer; ``decided`` is set when the group has decided."""
    with sender(address, **{"receivers": 2, **options}) as sending, Killer(at, decided) as killer:
        sending.send(Tiny(1), version=1)
        killer.arm()
        sending.send(Tiny(2), version=2)
        killer.arm(False)
        pipe.send("all points passed")
        pipe.recv()
