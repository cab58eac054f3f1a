"""Child: a forked process with a pipe to it. It is ended by its process id, and dies with its parent."""

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal

import torch

_context = multiprocessing.get_context("fork")
_PR_SET_PDEATHSIG = 1


def die_with_parent():
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """Runs ``work(pipe, *arguments)`` in a process of its own; use it in a ``with``, which kills it."""

    def __init__(self, work, *arguments):
        self.pipe, theirs = _context.Pipe()
        self.process = _context.Process(target=_run, args=(work, theirs, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.name = f"process {self.process.pid}"

    @property
    def alive(self):
        return self.process.is_alive()

    def heard(self, seconds):
        """What it says next; ``None`` if it says nothing for so long, or is dead."""
        multiprocessing.connection.wait([self.pipe, self.process.sentinel], seconds)
        try:
            return self.pipe.recv() if self.pipe.poll() else None
        except (EOFError, ConnectionError):
            return None

    def say(self, word):
        try:
            self.pipe.send(word)
        except OSError:
            return  # It is dead, which ``alive`` tells.

    def signal(self, number):
        if self.alive:
            os.kill(self.process.pid, number)

    def close(self):
        self.process.kill()
        self.process.join(10)
        self.process.close()
        self.pipe.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def _run(work, pipe, arguments):
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal goes to all; the parent ends its children.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    try:
        work(pipe, *arguments)
    except Exception as error:
        pipe.send(error if isinstance(error, OSError) else RuntimeError(f"{type(error).__name__}: {error}"))
