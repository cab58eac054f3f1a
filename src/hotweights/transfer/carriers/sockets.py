"""Sockets: a flow that is one TCP connection, from slot to slot. It needs no package, and no thread."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections import deque
from collections.abc import Sequence

import torch

from ... import signals
from ...errors import PeerLost
from ..channel import close_in_children
from ..flow import TOKEN, Carrier, Greeting, Waitable, bytes_of, stretches
from ..messages import Chunk

_AT_ONCE = 256  # pieces given to the kernel in one call


@signals.held_throughout
class SocketOutflow:
    """See ``Outflow``. What the kernel takes is sent."""

    def __init__(self) -> None:
        self.token = secrets.token_bytes(TOKEN)
        self.nbytes = 0
        self._socket: socket.socket | None = None
        self._views: deque[memoryview] = deque()
        self._memories: deque[torch.Tensor] = deque(maxlen=1)
        close_in_children(self)

    @property
    def waiting(self) -> tuple[Waitable, bool] | None:
        """The connection, if there is one and something waits for it."""
        return (self._socket, True) if self._views and self._socket is not None else None

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
        self._views.extend(bytes_of(memory, start, stop) for start, stop in stretches(chunks))

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
class SocketInflow:
    """See ``Inflow``. What has come is read straight into the slots."""

    ahead = 0

    def __init__(self, connecting: socket.socket, token: bytes) -> None:
        """Takes over a socket that is on its way to the sender."""
        self._socket = connecting
        self._greeting = Greeting(token)
        self._expected: deque[deque[memoryview]] = deque()  # of each slot what has not come
        close_in_children(self)

    @property
    def greets(self) -> bool:
        """Whether it waits until the socket can be written to."""
        return self._greeting.pending

    @property
    def awaited(self) -> tuple[Waitable, bool]:
        """The socket."""
        return self._socket, self.greets

    def greet(self) -> bool:
        """Say to the sender which flow this is. Returns whether that is said.

        Raises:
            PeerLost: nobody is there.
        """
        return self._greeting.say(self._socket)

    def expect(self, memory: torch.Tensor, chunks: Sequence[Chunk]) -> None:
        """What comes next are these chunks of a slot, ``uint8 [slot_nbytes]``, in which they lie."""
        self._expected.append(deque(bytes_of(memory, start, stop) for start, stop in stretches(chunks)))

    @signals.whole
    def take(self) -> int:
        """Take what has come. Returns how many of the slots that were expected are not there yet.

        Raises:
            PeerLost: the connection is gone.
        """
        if not self.greet():
            return len(self._expected)
        try:
            while self._expected:
                if self._take_of(self._expected[0]):
                    self._expected.popleft()
        except BlockingIOError:
            pass
        except OSError as error:
            raise PeerLost(f"the connection for bytes is gone: {error}") from error
        return len(self._expected)

    def _take_of(self, views: deque[memoryview]) -> bool:
        """Take what has come of one slot. Returns whether all of it is there."""
        if views:
            count = self._socket.recv_into(views[0])
            if not count:
                raise PeerLost("the connection for bytes ended")
            if count == len(views[0]):
                views.popleft()
            else:
                views[0] = views[0][count:]
        return not views

    def close(self) -> None:
        """Let go. May be called twice."""
        self._expected.clear()
        with contextlib.suppress(OSError):
            self._socket.close()

    def forget(self) -> None:
        """In a forked child: close the copy."""
        self.close()


CARRIER = Carrier("sockets", SocketOutflow, SocketInflow)
