"""Flow: how bytes of slots travel between hosts, beside the channel, whose frames say what they are. A contract."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .. import signals
from ..errors import PeerLost
from ..memory.addresses import buffer
from .messages import Chunk

TOKEN = 32
"""Bytes of a token: whoever shows it takes part by the channel through which it was given."""

GREETING = b"\0flow"
"""What a connection for bytes says first; a token follows. No frame begins so, and nothing of TLS."""

GAP = 4096
"""Bytes between two pieces that are sent with them: a piece costs more."""


def stretches(chunks: Sequence[Chunk]) -> list[tuple[int, int]]:
    """First byte and end of what is sent of a slot for these chunks, ascending. Both ends work it out."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted((chunk.offset, chunk.offset + chunk.nbytes) for chunk in chunks):
        if found and start - found[-1][1] <= GAP:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return [(start, stop) for start, stop in found if stop > start]


def bytes_of(memory: torch.Tensor, start: int, stop: int) -> memoryview:
    """Bytes of ``uint8 [n]``. Whoever keeps this keeps the tensor, too."""
    return memoryview(buffer(memory.data_ptr() + start, stop - start)).cast("B")


class Waitable(Protocol):
    """What ``poll`` waits for."""

    def fileno(self) -> int:
        """Its descriptor."""


class Outflow(Protocol):
    """The sender's end of one receiver's flow. Nothing of it blocks; one thread uses it.

    What is put arrives in that order. A flow of which something failed is of no use any more.

    Attributes:
        token: for the receiver, which shows it. The network's door gives the connection that does to ``attach``.
        nbytes: how many were sent, since somebody set it to 0.
    """

    token: bytes
    nbytes: int

    @property
    def attached(self) -> bool:
        """Whether the receiver has connected."""

    @property
    def waiting(self) -> tuple[Waitable, bool] | None:
        """What to wait for while something is unsent, and whether until it can be written to. Then ``flush``."""

    def attach(self, connected: socket.socket) -> None:
        """Take over the connection that showed the token."""

    def put(self, memory: torch.Tensor, chunks: Sequence[Chunk]) -> None:
        """Send the ``stretches`` of these chunks of a slot, which must not change before the receiver releases it."""

    def flush(self) -> None:
        """Go on with what is unsent.

        Raises:
            PeerLost: the other end is gone, or nothing can be sent to it.
        """

    def close(self) -> None:
        """Let go, soon: whatever still reads a slot keeps it alive until then. May be called twice."""

    def forget(self) -> None:
        """In a forked child: close the copies."""


class Inflow(Protocol):
    """A receiver's end of its flow. Nothing of it blocks; one thread uses it.

    Attributes:
        ahead: how many slots to expect behind the first one. 0 if nothing comes but in ``take``; else the flow goes on
            while its user copies a slot.
    """

    ahead: int

    @property
    def greets(self) -> bool:
        """Whether it has yet to say to the sender which flow this is."""

    @property
    def awaited(self) -> tuple[Waitable, bool]:
        """What to wait for, and whether until it can be written to. Then ``greet`` or ``take``."""

    def greet(self) -> bool:
        """Say to the sender which flow this is. Returns whether that is said.

        Raises:
            PeerLost: nobody is there.
        """

    def expect(self, memory: torch.Tensor, chunks: Sequence[Chunk]) -> None:
        """What comes next are these chunks of a slot, ``uint8 [slot_nbytes]``, in which they lie."""

    def take(self) -> int:
        """Take what has come. Returns how many of the slots that were expected are not there yet, the last of them.

        Raises:
            PeerLost: the other end is gone, or nothing can come from it.
        """

    def close(self) -> None:
        """Let go, soon: whatever still writes to a slot keeps it alive until then. May be called twice.

        Who goes on gets slots of its own: a transfer that was cancelled may still write to these.
        """

    def forget(self) -> None:
        """In a forked child: close the copies."""


@dataclass(frozen=True, slots=True)
class Carrier:
    """How bytes get from one host to another: what makes the two ends of a flow.

    Attributes:
        name: what ``Sender(carrier=)`` says.
        outflow: makes a sender's end.
        inflow: makes a receiver's end, of a socket that is on its way to the sender and the token to show there.
    """

    name: str
    outflow: Callable[[], Outflow]
    inflow: Callable[[socket.socket, bytes], Inflow]


class Greeting:
    """What a receiver says first on a connection for bytes."""

    def __init__(self, token: bytes) -> None:
        self._unsaid = GREETING + token

    @property
    def pending(self) -> bool:
        """Whether some of it is unsaid."""
        return bool(self._unsaid)

    @signals.whole
    def say(self, connecting: socket.socket) -> bool:
        """Say what the socket takes. Returns whether all of it is said.

        Raises:
            PeerLost: nobody is there.
        """
        try:
            while self._unsaid:
                self._unsaid = self._unsaid[connecting.send(self._unsaid) :]
        except BlockingIOError:
            return False
        except OSError as error:
            raise PeerLost(f"the connection for bytes is gone: {error}") from error
        return True
