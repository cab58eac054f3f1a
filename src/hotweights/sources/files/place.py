"""Place: where a file or a directory lies, on disk or in an object store, and what is asked of it.

``pathlib.Path`` is a place on disk; ``objects/address.py`` has the places in stores. What is opened there is a
``Readable``. Whoever opens a checkpoint asks here, and need not know which of the two it is.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from ...errors import CheckpointError
from .file import Buffer, File


class Readable(Protocol):
    """A file, or an object of a store, that was opened: any bytes of it can be read. ``File`` says what each does."""

    @property
    def path(self) -> str:
        """Its path or address."""

    @property
    def size(self) -> int:
        """Bytes that it has."""

    def pread(self, nbytes: int, offset: int) -> bytes:
        """Exactly ``nbytes`` from ``offset``."""

    def read_into(self, buffers: Sequence[Buffer], offset: int, ended: Callable[[], bool] = ...) -> None:
        """Fill the buffers in turn from ``offset`` on. Once ``ended`` says true, a wait may end with ``Closed``."""

    def check(self) -> None:
        """Raise ``CheckpointChanged`` if it is not what was opened."""

    def close(self) -> None:
        """Close it. May be called twice."""


class Remote(os.PathLike[str]):
    """A place in an object store. It has the methods of ``pathlib.Path`` that are used on places."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The last part of the address."""

    @property
    @abstractmethod
    def parent(self) -> Remote:
        """The place that this one lies in."""

    @abstractmethod
    def __truediv__(self, name: str) -> Remote: ...

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is such an object; of what looks like a directory always."""

    @abstractmethod
    def is_object(self) -> bool:
        """Whether there is such an object, whatever its name looks like."""

    @abstractmethod
    def is_dir(self) -> bool:
        """Whether it is no object, by its name: stores have no directories."""

    @abstractmethod
    def names(self) -> list[str]:
        """The names of all that lies here."""

    @abstractmethod
    def open(self) -> Readable:
        """The object. The caller closes it."""

    @abstractmethod
    def open_soon(self, places: Iterable[Remote]) -> None:
        """Begin to open these, all at once, in the same store."""


Place = Path | Remote


def exists(place: Place) -> bool:
    """Whether something lies there."""
    # Unlike Path.exists, false for names that are too long.
    return place.exists() if isinstance(place, Remote) else os.path.exists(place)


def is_named_file(place: Place) -> bool:
    """Whether something lies there that a list of files may name: in a store an object, whatever it is called."""
    return place.is_object() if isinstance(place, Remote) else os.path.exists(place)


def is_dir(place: Place) -> bool:
    """Whether it is a directory."""
    return place.is_dir() if isinstance(place, Remote) else os.path.isdir(place)


def names_in(directory: Place) -> list[str]:
    """The names of all that lies in the directory."""
    if isinstance(directory, Remote):
        return sorted(directory.names())
    try:
        return sorted(os.listdir(directory))  # Path.glob would compile an expression first, for milliseconds.
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be listed: {error.strerror}", cause="cannot_open") from error


def open_place(place: Place) -> Readable:
    """What lies there, to read it. The caller closes it."""
    return place.open() if isinstance(place, Remote) else File(str(place))


def open_soon(places: Sequence[Place]) -> None:
    """Begin to open what will be opened: in a store each opening waits for an answer."""
    remote = [place for place in places if isinstance(place, Remote)]
    if remote:
        remote[0].open_soon(remote)


def text_of(place: Place) -> bytes:
    """All of a small file. Raises ``OSError`` or ``CheckpointError`` if it cannot be read."""
    if isinstance(place, Path):
        return place.read_bytes()
    file = place.open()
    try:
        return file.pread(file.size, 0)
    finally:
        file.close()
