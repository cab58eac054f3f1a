"""Channel: frames and descriptors over one socket, in the order that the table of states allows."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import weakref
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from .. import signals
from ..errors import PeerLost, ProtocolError
from .messages import (
    DESCRIPTORS,
    HEADER,
    LARGE,
    MAX_FRAME,
    MAX_SMALL,
    REASON,
    Broken,
    Frame,
    Message,
    decode,
    decode_header,
    encode,
    is_kind,
    kind_of,
)
from .states import Session, SessionState, Side

_CHUNK = 256 * 1024  # bytes asked for at once
_MANY = 8  # descriptors that may come to a receiver at once; the protocol never sends two, and none to a sender


class _Outgoing(NamedTuple):
    """A frame that is to be sent, and where it ends in all that this end says."""

    raw: memoryview
    descriptors: tuple[int, ...]
    stop: int


class Channel:
    """One end of a connection. It never blocks; whoever uses it waits until the socket is ready.

    Attributes:
        socket: the channel's own.
        session: the state of the connection, as this end sees it.
        shares: whether descriptors go through it, and so memory is shared with the other end.
        host: where the other end is; empty on this host.
        other: the other end, for people.
    """

    shares = True
    host = ""
    other = "the other side"

    def __init__(self, connected: socket.socket, side: Side) -> None:
        """Takes over the socket."""
        connected.setblocking(False)
        self.socket = connected
        self.session = Session(side)
        self._out: deque[_Outgoing] = deque()
        self._counts = [0]  # Their sum is how many bytes the socket took, of all frames until now.
        self._in = bytearray()
        self.goodbye = False  # Whether the other end said that it goes; ``read`` notes it.
        self._descriptors: deque[int] = deque()
        self._failure: OSError | None = None  # of the last write; the next look for bytes finds none
        close_in_children(self)

    @property
    def unsent(self) -> bool:
        """Whether something waits until the socket can be written to."""
        return bool(self._out)

    @signals.whole  # A signal between the step of the session and the queue would lose the frame.
    def send(self, message: Message, *, update: int | None = None, descriptors: Sequence[int] = ()) -> None:
        """Send a message; what the socket does not take now waits for ``flush``.

        Descriptors stay the caller's, and must stay open until ``unsent`` is false. A dead peer is not noticed here:
        ``read`` raises, with what it said last.
        """
        update = self.session.update if update is None else update
        frame = encode(update, message, len(descriptors))  # First: if this raises, the session must not have moved.
        if not isinstance(message, Broken):
            self.session.sent(kind_of(message), update)
            self._moved()
        self._put(self._outgoing(frame), tuple(descriptors))
        self.flush()

    @signals.whole
    def flush(self) -> None:
        """Write what waits, as far as the socket takes it."""
        while True:
            self._counts[:] = [sum(self._counts)]
            while self._out and self._out[0].stop <= self._counts[0]:
                self._out.popleft()
            if not self._out:
                return
            frame = self._out[0]
            rest = frame.stop - self._counts[0]
            with_it = frame.descriptors if rest == len(frame.raw) else ()
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", with_it))] if with_it else []
            try:
                # One call of C: an interruption between the sending and this note would have it sent twice.
                self._counts.extend(map(self.socket.sendmsg, ([frame.raw[-rest:]],), (ancillary,)))
            except BlockingIOError:
                return
            except OSError as error:
                self._failure = error
                self._counts[:] = [self._out[-1].stop]  # Whoever reads is told.

    @signals.whole
    def read(self) -> Frame | None:
        """The next frame, if it is there. Its descriptors are the caller's.

        Raises:
            PeerLost: the other end is gone, or says that it goes; with its words.
            ProtocolError: what came breaks the protocol. The caller tells the other end, with ``say_goodbye``.
        """
        while (frame := self._next()) is None:
            if not self._fill():
                return None
        if isinstance(frame.message, Broken):
            self.goodbye = True
            raise PeerLost(f"{self.other} ended the connection: {frame.message.reason}")
        return frame

    def look(self) -> None:
        """Take what came; ``read`` gives it later.

        Raises:
            PeerLost: the other end is gone. What it said before that can be read.
        """
        self._fill()

    def brings(self, kind: type[Message], *, next_only: bool = False) -> bool:
        """Whether a message of this kind came, and ``read`` gives it later; or gives it next.

        Raises:
            ProtocolError: what came is no frame.
        """
        start = 0
        while len(raw := self._in[start : start + HEADER.size]) == HEADER.size:
            start += HEADER.size
            nbytes = decode_header(raw).nbytes
            if start + nbytes <= len(self._in) and is_kind(self._in[start : start + HEADER.size], kind):
                return True
            if next_only:
                return False
            start += nbytes
        return False

    def say_goodbye(self, reason: str) -> None:
        """Tell the other end why nothing more will come, as far as the socket takes it, and close."""
        self.send(Broken(reason[:REASON]), update=0)
        self.close()

    def close(self) -> None:
        """Close the socket, and descriptors that nobody took. May be called twice."""
        self.socket.close()
        self._out.clear()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def forget(self) -> None:
        """In a forked child: close the copy, so that the parent's death is noticed."""
        self.close()

    # What a channel between hosts does otherwise.

    def is_due(self) -> bool:
        """Whether to read although nothing seems to have come: reading notices then that the other end is cut off."""
        return False

    def _outgoing(self, frame: bytes) -> bytes:
        """What is sent for a frame now."""
        return frame

    def _incoming(self, raw: bytes) -> bytes:
        """What came, by what the socket had."""
        return raw

    def _moved(self) -> None:
        """The state of the session has changed."""

    def _silent(self) -> None:
        """Nothing has come."""

    def _put(self, raw: bytes, descriptors: tuple[int, ...] = ()) -> None:
        """Have bytes sent after all others."""
        start = self._out[-1].stop if self._out else sum(self._counts)
        if raw:
            self._out.append(_Outgoing(memoryview(raw), descriptors, start + len(raw)))

    def _next(self) -> Frame | None:
        if len(self._in) < HEADER.size:
            return None
        most = MAX_FRAME if self.session.may_come() & LARGE else MAX_SMALL
        header = decode_header(self._in, most)
        end = HEADER.size + header.nbytes
        if len(self._in) < end:
            return None
        # Decoded from a copy: a view of the buffer that a traceback keeps would forbid to shorten it.
        message = decode(self._in[HEADER.size : end])
        del self._in[:end]
        if not isinstance(message, Broken):
            self.session.came(kind_of(message), header.update)
            self._moved()
        kind = kind_of(message)
        expected = DESCRIPTORS.get(kind, 0) if self.shares else 0
        if header.descriptors != expected:
            raise ProtocolError(f"{kind!r} comes with {expected} descriptors, not with {header.descriptors}")
        if expected > len(self._descriptors):
            raise ProtocolError(f"{kind!r} came without its descriptor")
        return Frame(header.update, message, tuple(self._descriptors.popleft() for _ in range(header.descriptors)))

    def _fill(self) -> bool:
        """Take what the socket has. Returns false if it has nothing now."""
        space = socket.CMSG_SPACE(_MANY * array.array("i").itemsize)
        try:
            # Less of a stranger: many of them may be here, and each may say half of something.
            nbytes = MAX_SMALL if self.session.state is SessionState.CONNECTED else _CHUNK
            raw, ancillary, flags, _ = self.socket.recvmsg(nbytes, space, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            self._silent()
            return False
        except OSError as error:
            raise PeerLost(f"the connection to {self.other} is gone: {error}") from error
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors = array.array("i")
                descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
                self._descriptors.extend(descriptors)
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError("descriptors came and were lost: too many, or this process may open no more")
        if len(self._descriptors) > (_MANY if self.session.side is Side.RECEIVER else 0):
            raise ProtocolError("more descriptors came than the protocol knows")
        if not raw:
            why = f": {self._failure}" if self._failure and not self.shares else ""
            raise PeerLost(f"{self.other} is gone" + (", in the middle of a frame" if self._in else "") + why)
        self._in += self._incoming(raw)
        return True


class _Forgetting(Protocol):
    def forget(self) -> None: ...


# A copy that a forked child holds would hide the parent's death from the other side.
_inherited: weakref.WeakSet[_Forgetting] = weakref.WeakSet()
_registered: list[bool] = []


def close_in_children(owner: _Forgetting) -> None:
    """Have ``owner.forget()`` called in every forked child."""
    if not _registered:
        os.register_at_fork(after_in_child=_forget_all)
        _registered.append(True)
    _inherited.add(owner)


def _forget_all() -> None:
    for owner in list(_inherited):
        with contextlib.suppress(OSError):
            owner.forget()
