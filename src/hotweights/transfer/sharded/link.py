"""Link: words over one socket between two ranks of a trainer. It never blocks."""

from __future__ import annotations

import array
import os
import socket
from collections import deque

from ... import signals
from ...errors import PeerLost
from ..channel import close_in_children
from .words import HEADER, Farewell, Word, decode, decode_header, encode

_CHUNK = 1024 * 1024  # bytes asked for at once


class Link:
    """One end. Whoever uses it waits until the socket is ready.

    Attributes:
        socket: the link's own.
        shares: whether descriptors go through it, and so memory is shared with the other end.
        host: where the other end is; empty on this host.
        heard: whether the other end said something.
    """

    shares = True
    host = ""

    def __init__(self, connected: socket.socket) -> None:
        """Takes over the socket."""
        connected.setblocking(False)
        self.socket = connected
        self._out: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._sent = [0]  # Their sum is how much the socket took of the first word.
        self._in = bytearray()
        self._descriptors: deque[int] = deque()
        self.heard = False
        close_in_children(self)

    @property
    def unsent(self) -> bool:
        """Whether something waits until the socket can be written to."""
        return bool(self._out)

    @property
    def is_open(self) -> bool:
        """Whether it was not closed."""
        return self.socket.fileno() >= 0

    @signals.whole
    def send(self, word: Word, *, descriptor: int | None = None) -> None:
        """Say a word; what the socket does not take now waits for ``flush``. ``read`` notices who is gone."""
        self._put(self._outgoing(encode(word)), () if descriptor is None else (descriptor,))
        self.flush()

    @signals.whole
    def flush(self) -> None:
        """Write what waits, as far as the socket takes it."""
        while self._out:
            raw, descriptors = self._out[0]
            sent = sum(self._sent)
            if sent >= len(raw):
                self._out.popleft()
                self._sent[:] = [0]
                continue
            with_it = descriptors if not sent else ()
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", with_it))] if with_it else []
            try:
                # One call of C: an interruption between the sending and this note would have it sent twice.
                self._sent.extend(map(self.socket.sendmsg, ([raw[sent:]],), (ancillary,)))
            except BlockingIOError:
                return
            except OSError:
                self._out.clear()
                self._sent[:] = [0]

    @signals.whole
    def read(self) -> Word | None:
        """The next word, if it is there.

        Raises:
            PeerLost: the other end is gone, or says that it goes.
            ProtocolError: what came is no word.
        """
        while (word := self._next()) is None:
            if not self._fill():
                return None
        self.heard = True
        if isinstance(word, Farewell):
            raise PeerLost(word.reason)
        return word

    def take_descriptor(self) -> int | None:
        """The descriptor that came with the last word, if one did. It is the caller's."""
        return self._descriptors.popleft() if self._descriptors else None

    def say_goodbye(self, reason: str) -> None:
        """Tell the other end why nothing more will come, as far as the socket takes it, and close."""
        if self.is_open:
            self.send(Farewell(reason))
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

    # What a link between hosts does otherwise.

    def _outgoing(self, raw: bytes) -> bytes:
        """What is sent for a word now."""
        return raw

    def _incoming(self, raw: bytes) -> bytes:
        """What came, by what the socket had."""
        return raw

    def _silent(self) -> None:
        """Nothing has come."""

    def _put(self, raw: bytes, descriptors: tuple[int, ...] = ()) -> None:
        if raw:
            self._out.append((memoryview(raw), descriptors))

    def _next(self) -> Word | None:
        if len(self._in) < HEADER.size:
            return None
        end = HEADER.size + decode_header(self._in).nbytes
        if len(self._in) < end:
            return None
        word = decode(self._in[HEADER.size : end])
        del self._in[:end]
        return word

    def _fill(self) -> bool:
        """Take what the socket has. Returns false if it has nothing now."""
        item = array.array("i").itemsize
        try:
            raw, ancillary, _, _ = self.socket.recvmsg(_CHUNK, socket.CMSG_SPACE(item), socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            self._silent()
            return False
        except OSError as error:
            raise PeerLost(f"the connection is gone: {error}") from error
        for _, kind, data in ancillary:
            if kind == socket.SCM_RIGHTS:
                descriptors = array.array("i")
                descriptors.frombytes(data[: len(data) - len(data) % item])
                self._descriptors.extend(descriptors)
        if not raw:
            raise PeerLost("it is gone")
        self._in += self._incoming(raw)
        return True
