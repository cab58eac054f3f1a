"""Flows: bytes of slots on their way between hosts, beside the channel, whose frames say what they are."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections import deque
from collections.abc import Sequence

import torch

from .. import signals
from ..errors import PeerLost
from ..memory.addresses import buffer
from .channel import close_in_children
from .messages import Chunk

TOKEN = 32
"""Bytes of a token: whoever shows it takes part by the channel through which it was given."""

GREETING = b"\0flow"
"""What a connection for bytes says first; a token follows. No frame begins so, and nothing of TLS."""

_GAP = 4096  # Bytes between two pieces that are sent with them: a piece costs more.
_AT_ONCE = 256  # pieces given to the kernel in one call


def stretches(chunks: Sequence[Chunk]) -> list[tuple[int, int]]:
    """First byte and end of what is sent of a slot for these chunks, ascending. Both ends work it out."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted((chunk.offset, chunk.offset + chunk.nbytes) for chunk in chunks):
        if found and start - found[-1][1] <= _GAP:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return [(start, stop) for start, stop in found if stop > start]


def _view(memory: torch.Tensor, start: int, stop: int) -> memoryview:
    """Bytes of ``uint8 [n]``; whoever keeps this keeps the memory."""
    return memoryview(buffer(memory.data_ptr() + start, stop - start)).cast("B")


@signals.held_throughout
class Outflow:
    """The sender's end of one receiver's flow. It never blocks.

    Attributes:
        token: for the receiver, which shows it.
        nbytes: how many were sent, since somebody set it to 0.
    """

    def __init__(self) -> None:
        self.token = secrets.token_bytes(TOKEN)
        self.nbytes = 0
        self._socket: socket.socket | None = None
        self._views: deque[memoryview] = deque()
        self._memories: deque[torch.Tensor] = deque(maxlen=1)
        close_in_children(self)

    @property
    def waiting(self) -> socket.socket | None:
        """The connection, if there is one and something waits for it."""
        return self._socket if self._views else None

    @property
    def attached(self) -> bool:
        """Whether the receiver has connected."""
        return self._socket is not None

    def attach(self, connected: socket.socket) -> None:
        """Take over the connection that showed the token."""
        self._socket = connected

    def put(self, memory: torch.Tensor, chunks: Sequence[Chunk]) -> None:
        """Send what these chunks are of a slot, which must not change before the receiver has released it."""
        self._memories.append(memory)
        self._views.extend(_view(memory, start, stop) for start, stop in stretches(chunks))

    @signals.whole
    def flush(self) -> None:
        """Send what the connection takes.

        Raises:
            PeerLost: it is gone.
        """
        while self._views and self._socket is not None:
            views = [view for view, _ in zip(self._views, range(_AT_ONCE), strict=False)]
            try:
                count = self._socket.sendmsg(views)
            except BlockingIOError:
                return
            except OSError as error:
                raise PeerLost(f"the connection for its bytes is gone: {error}") from error
            self.nbytes += count
            while count and count >= len(self._views[0]):
                count -= len(self._views.popleft())
            if count:
                self._views[0] = self._views[0][count:]

    def close(self) -> None:
        """Let go. May be called twice."""
        self._views.clear()
        if self._socket is not None:
            self._socket.close()

    def forget(self) -> None:
        """In a forked child: close the copy."""
        self.close()


@signals.held_throughout
class Inflow:
    """A receiver's end of its flow. It never blocks.

    Attributes:
        socket: its own.
    """

    def __init__(self, connecting: socket.socket, token: bytes) -> None:
        """Takes over a socket that is on its way to the sender."""
        self.socket = connecting
        self._greeting = GREETING + token
        self._views: deque[memoryview] = deque()
        close_in_children(self)

    @property
    def greets(self) -> bool:
        """Whether it waits until the socket can be written to."""
        return bool(self._greeting)

    def expect(self, memory: torch.Tensor, chunks: Sequence[Chunk]) -> None:
        """What comes next are these chunks of a slot, ``uint8 [slot_nbytes]``, in which they lie."""
        self._views.extend(_view(memory, start, stop) for start, stop in stretches(chunks))

    @signals.whole
    def greet(self) -> bool:
        """Say to the sender which flow this is. Returns whether that is said.

        Raises:
            PeerLost: nobody is there.
        """
        try:
            while self._greeting:
                self._greeting = self._greeting[self.socket.send(self._greeting) :]
        except BlockingIOError:
            return False
        except OSError as error:
            raise PeerLost(f"the connection for bytes is gone: {error}") from error
        return True

    @signals.whole
    def fill(self) -> bool:
        """Take what has come. Returns whether everything that was expected is there.

        Raises:
            PeerLost: the connection is gone.
        """
        try:
            if not self.greet():
                return False
            while self._views:
                count = self.socket.recv_into(self._views[0])
                if not count:
                    raise PeerLost("the connection for bytes ended")
                if count == len(self._views[0]):
                    self._views.popleft()
                else:
                    self._views[0] = self._views[0][count:]
        except BlockingIOError:
            return False
        except OSError as error:
            raise PeerLost(f"the connection for bytes is gone: {error}") from error
        return True

    def close(self) -> None:
        """Let go. May be called twice."""
        self._views.clear()
        with contextlib.suppress(OSError):
            self.socket.close()

    def forget(self) -> None:
        """In a forked child: close the copy."""
        self.close()
