"""Object: one object of a store that is read like a file, and is the same object from its opening on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...errors import CheckpointChanged, Closed
from ..files.file import Buffer, rest
from .store import Store


class Object:
    """An open object. Each answer must be of the object that was opened: nothing of another is ever taken."""

    def __init__(self, store: Store, key: str) -> None:
        opened = store.opened(key)
        self.path = store.path(key)
        self.size = opened.pin.size
        self.key = key
        self._store = store
        self._pin = opened.pin
        self._start = opened.start
        self._closed = False

    def pread(self, nbytes: int, offset: int) -> bytes:
        """Exactly ``nbytes`` from ``offset``."""
        memory = bytearray(nbytes)
        if nbytes:
            self.read_into([memory], offset)
        return bytes(memory)

    def read_into(self, buffers: Sequence[Buffer], offset: int, ended: Callable[[], bool] = bool) -> None:
        """Fill the buffers in turn with the object's bytes from ``offset``. See ``Store.read``."""
        self.check()
        nbytes = sum(map(len, buffers))
        if offset + nbytes > self.size:
            raise CheckpointChanged(f"{self.path}: ends at byte {self.size}")
        known = self._start[offset : offset + nbytes]
        done = 0
        for memory in buffers:
            piece = known[done : done + len(memory)]
            memoryview(memory).cast("B")[: len(piece)] = piece
            done += len(piece)
            if len(piece) < len(memory):
                break
        if done < nbytes:
            self._store.read(self.key, self._pin, rest(buffers, done), offset + done, ended)

    def check(self) -> None:
        """Raise ``Closed`` if it is. Whether it is the same object is seen in each answer."""
        if self._closed:
            raise Closed(f"{self.path} was closed")

    def check_again(self) -> None:
        """Ask the store whether the address still leads to the object that was opened.

        Raises:
            CheckpointChanged: it does not.
        """
        self.check()
        try:
            changed = self._pin.changed(self._store.head(self.key))
        except FileNotFoundError:
            changed = "it went away"
        if changed:
            raise CheckpointChanged(f"{self.path}: the object was replaced after it was opened: {changed}")

    def close(self) -> None:
        """Close it. May be called twice."""
        self._closed = True

    def __repr__(self) -> str:
        return f"<Object {self.path!r} {self.size} bytes{' closed' if self._closed else ''}>"
