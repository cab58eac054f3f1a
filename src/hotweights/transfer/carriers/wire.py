"""Wire: what the ends of a carrier tell each other, over the connection that showed the token; no bytes of slots."""

from __future__ import annotations

import contextlib
import select
import socket
import struct

from ...errors import PeerLost, ProtocolError

_LENGTH = struct.Struct("<I")
_MOST = 1024 * 1024  # bytes of a word: an agent's description of itself takes some thousands


class Wire:
    """One thread speaks and listens, and blocks. Any thread may ``stop`` it."""

    def __init__(self, connected: socket.socket) -> None:
        """Takes over the socket."""
        self._socket = connected

    @property
    def hosts(self) -> tuple[str, str]:
        """The addresses of this end and of the other one."""
        return str(self._socket.getsockname()[0]), str(self._socket.getpeername()[0])

    def say(self, word: bytes) -> None:
        """Say something.

        Raises:
            PeerLost: nobody listens any more, or ``stop`` was called.
        """
        try:
            self._socket.sendall(_LENGTH.pack(len(word)) + word)
        except OSError as error:
            raise PeerLost(f"the connection for bytes is gone: {error}") from error

    def hear(self, seconds: float | None = None) -> bytes:
        """Wait for the next word.

        Raises:
            PeerLost: none came within these seconds, or comes any more, or ``stop`` was called.
            ProtocolError: it is too long.
        """
        try:
            self._socket.settimeout(seconds)
            (nbytes,) = _LENGTH.unpack(self._read(_LENGTH.size))
            if nbytes > _MOST:
                raise ProtocolError(f"a word of {nbytes} bytes came on a connection for bytes; {_MOST} is the most")
            return self._read(nbytes)
        except OSError as error:
            raise PeerLost(f"the connection for bytes is gone: {error}") from error

    def _read(self, nbytes: int) -> bytes:
        came = bytearray()
        while len(came) < nbytes:
            if not (part := self._socket.recv(nbytes - len(came))):
                raise PeerLost("the connection for bytes ended")
            came += part
        return bytes(came)

    @property
    def has_come(self) -> bool:
        """Whether a word has begun to come, or the end of the connection."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def stop(self) -> None:
        """End every wait, at both ends. Any thread may call it, twice."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go. Nobody uses it."""
        self._socket.close()
