"""Threads: a flow over a library whose calls block. A thread of its own makes them, and ends with the flow."""

from __future__ import annotations

import os
import queue
import secrets
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from ... import signals
from ...errors import PeerLost, TransferError
from ..channel import close_in_children
from ..flow import TOKEN, Greeting, Waitable, stretches
from ..messages import Chunk
from .wire import Wire


class LibraryEnd(Protocol):
    """One end of what a library connects. Its thread calls all but ``stop``, and may be blocked there."""

    def open(self) -> None:
        """Meet the other end."""

    def can_begin(self) -> bool:
        """Whether ``begin`` would not wait for the other end."""

    def begin(self, piece: torch.Tensor, memory: torch.Tensor) -> None:
        """Begin to send or receive a piece of a slot, ``uint8 [n]`` of ``uint8 [slot_nbytes]``."""

    def finish(self) -> None:
        """Return when the piece that was begun first is through."""

    def stop(self) -> None:
        """Have whatever runs fail soon. Any thread may call it."""

    def close(self) -> None:
        """Let go. After this the library neither reads nor writes what was moved."""


MakeEnd = Callable[[Wire, bool], LibraryEnd]
"""Makes one, over the connection that showed the token; the sender's end where it is true."""


AT_ONCE = 2
"""Pieces under way at a time: one goes on while both ends tell each other that the other one is there."""


class Bell:
    """What a thread rings, and what a wait for sockets hears."""

    def __init__(self) -> None:
        try:
            self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            raise TransferError(f"nothing to wait with can be had: {error}") from error
        # A thread could ring whatever has the number of a descriptor that another one just closed.
        self._open = threading.RLock()

    def fileno(self) -> int:
        """Its descriptor: it can be read from when it was rung."""
        return self._event

    def ring(self) -> None:
        """End the running wait, or the next one."""
        with self._open:
            if self._event >= 0:
                os.eventfd_write(self._event, 1)

    def heard(self) -> None:
        """Be silent until it is rung again."""
        with self._open:
            if self._event >= 0:
                try:
                    os.eventfd_read(self._event)
                except BlockingIOError:
                    return

    def close(self) -> None:
        """Let go. May be called twice."""
        with self._open:
            event, self._event = self._event, -1
            if event >= 0:
                os.close(event)


@signals.held_throughout
class Mover:
    """A thread that moves pieces in their order. It owns the library's end, and keeps memory until it has ended.

    Attributes:
        bell: is rung when a piece was moved, or something failed.
    """

    def __init__(self, connected: socket.socket, make: MakeEnd, *, sends: bool) -> None:
        connected.setblocking(True)
        self._wire = Wire(connected)
        try:
            self.bell = Bell()
        except BaseException:
            self._wire.close()
            raise
        self._end = make(self._wire, sends)
        self._pieces: queue.SimpleQueue[tuple[torch.Tensor, torch.Tensor] | None] = queue.SimpleQueue()
        self._queued = 0  # Only the flow's thread counts here,
        self._moved = 0  # and only the mover's here.
        self._lasts: deque[int] = deque()  # of each slot that was put, how many pieces it and those before have
        self._failure = ""
        self._stopped = False
        self._met = False
        threading.Thread(target=self._run, name="hotweights carrier", daemon=True).start()

    @property
    def lacking(self) -> int:
        """How many slots that were put were not moved."""
        while self._lasts and self._lasts[0] <= self._moved:
            self._lasts.popleft()
        return len(self._lasts)

    def put(self, memory: torch.Tensor, chunks: Sequence[Chunk]) -> int:
        """Move what these chunks are of a slot, after all that was put before. Returns how many bytes that is."""
        pieces = [memory[start:stop] for start, stop in stretches(chunks)]
        self._queued += len(pieces)
        self._lasts.append(self._queued)
        for piece in pieces:
            self._pieces.put((piece, memory))
        return sum(piece.numel() for piece in pieces)

    def check(self) -> None:
        """Hear the bell.

        Raises:
            PeerLost: something failed, and nothing will be moved any more.
        """
        self.bell.heard()
        if failure := self._failure:
            raise PeerLost(failure)

    def stop(self) -> None:
        """End soon. May be called twice."""
        self._stopped = True
        self._pieces.put(None)
        # Two ends that meet are let meet: gloo waits for ever for one that has told its address and never comes.
        if self._met:
            self._wire.stop()
            self._end.stop()
        self.bell.close()

    def forget(self) -> None:
        """In a forked child, where the thread is not."""
        self._wire.close()
        self.bell.close()

    def _run(self) -> None:
        try:
            self._end.open()
            self._met = True
            self._move()
        except BaseException as error:
            # Words only: the frames of an error hold memory that the end is to let go of.
            self._failure = f"the connection for bytes failed: {error}"
            self.bell.ring()
        finally:
            try:
                self._end.close()
            finally:
                self._wire.stop()
                self._wire.close()

    def _move(self) -> None:
        """Move pieces until there are no more."""
        begun = 0
        while not self._stopped:
            if not begun or (begun < AT_ONCE and self._end.can_begin()):
                try:
                    piece = self._pieces.get(block=not begun)
                except queue.Empty:
                    pass
                else:
                    if piece is None:
                        return
                    self._end.begin(*piece)
                    begun += 1
                    continue
            self._end.finish()
            begun -= 1
            self._moved += 1
            self.bell.ring()


@signals.held_throughout
class ThreadOutflow:
    """See ``Outflow``."""

    def __init__(self, make: MakeEnd) -> None:
        self.token = secrets.token_bytes(TOKEN)
        self.nbytes = 0
        self._make = make
        self._mover: Mover | None = None
        close_in_children(self)

    @property
    def waiting(self) -> tuple[Waitable, bool] | None:
        """The bell, while something is unsent."""
        return None if self._mover is None or not self._mover.lacking else (self._mover.bell, False)

    @property
    def attached(self) -> bool:
        """Whether the receiver has connected."""
        return self._mover is not None

    def attach(self, connected: socket.socket) -> None:
        """Take over the connection that showed the token."""
        self._mover = Mover(connected, self._make, sends=True)

    def put(self, memory: torch.Tensor, chunks: Sequence[Chunk]) -> None:
        """Send what these chunks are of a slot, which must not change before the receiver has released it."""
        assert self._mover is not None, "nothing is offered to who has not connected"
        self.nbytes += self._mover.put(memory, chunks)

    def flush(self) -> None:
        """See that nothing failed.

        Raises:
            PeerLost: something did.
        """
        if self._mover is not None:
            self._mover.check()

    def close(self) -> None:
        """Let go, soon. May be called twice."""
        if self._mover is not None:
            self._mover.stop()

    def forget(self) -> None:
        """In a forked child: close the copies."""
        if self._mover is not None:
            self._mover.forget()


@signals.held_throughout
class ThreadInflow:
    """See ``Inflow``."""

    ahead = AT_ONCE

    def __init__(self, make: MakeEnd, connecting: socket.socket, token: bytes) -> None:
        """Takes over a socket that is on its way to the sender."""
        self._make = make
        self._socket = connecting
        self._greeting = Greeting(token)
        self._mover: Mover | None = None
        self._early: list[tuple[torch.Tensor, Sequence[Chunk]]] = []  # what is expected before there is a mover
        close_in_children(self)

    @property
    def greets(self) -> bool:
        """Whether it has yet to say to the sender which flow this is."""
        return self._mover is None

    @property
    def awaited(self) -> tuple[Waitable, bool]:
        """The socket until it has greeted, and the bell after that."""
        return (self._socket, True) if self._mover is None else (self._mover.bell, False)

    def greet(self) -> bool:
        """Say to the sender which flow this is. Returns whether that is said.

        Raises:
            PeerLost: nobody is there.
        """
        if self._mover is None:
            if not self._greeting.say(self._socket):
                return False
            self._mover = Mover(self._socket, self._make, sends=False)
            for memory, chunks in self._early:
                self._mover.put(memory, chunks)
            self._early.clear()
        return True

    def expect(self, memory: torch.Tensor, chunks: Sequence[Chunk]) -> None:
        """What comes next are these chunks of a slot, ``uint8 [slot_nbytes]``, in which they lie."""
        if self._mover is None:
            self._early.append((memory, chunks))
        else:
            self._mover.put(memory, chunks)

    def take(self) -> int:
        """See what has come. Returns how many of the slots that were expected are not there yet.

        Raises:
            PeerLost: something failed.
        """
        if not self.greet():
            return len(self._early)
        assert self._mover is not None
        self._mover.check()
        return self._mover.lacking

    def close(self) -> None:
        """Let go, soon. May be called twice."""
        self._early.clear()
        self._socket.close() if self._mover is None else self._mover.stop()

    def forget(self) -> None:
        """In a forked child: close the copies."""
        self._socket.close() if self._mover is None else self._mover.forget()
