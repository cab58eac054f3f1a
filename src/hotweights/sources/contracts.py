"""What a source promises, as two short contracts. No source lives here.

Every source is a ``Source``: it can be streamed. Some are ``Addressed`` too: they give any bytes of any tensor,
in any order, into memory of the caller's choice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, Protocol, runtime_checkable

import msgspec
import torch

from ..manifest import Manifest
from ..memory.devices import Event
from ..memory.guards import Guard
from ..memory.lease import Lease
from ..memory.pool import Pool
from ..ranges import Range
from ..signals import held

IOMode = Literal["auto", "buffered", "direct"]
"""How files are read: ``buffered`` through the page cache, ``direct`` around it, ``auto`` by what is cached."""

Sink = Callable[[torch.Tensor], "Event | None"]
"""Takes borrowed bytes (``uint8 [n]``), valid until it returns, or until the event it returns has happened."""


class Read(msgspec.Struct, frozen=True, gc=False):
    """A request: the bytes ``start .. start + nbytes`` of a tensor, into memory.

    Attributes:
        name: which tensor.
        start: first byte within the tensor, row-major.
        nbytes: how many.
        into: a contiguous host tensor of ``nbytes`` bytes that is filled, or a sink that is called once,
            possibly from another thread; a sink's request must fit into one slot of the pool.
    """

    name: str
    start: int
    nbytes: int
    into: torch.Tensor | Sink


class Request(msgspec.Struct, frozen=True, gc=False):
    """A tensor that is wanted of a version, or a part of it.

    Attributes:
        name: which tensor.
        ranges: which bytes, ascending and apart; ``None`` for all.
        into: where the bytes of the one range may be put as they are. Called once, by the stream, when the first of
            them are there; gives a contiguous ``uint8`` host tensor of that size, which stays the caller's; then the
            lease says ``placed``. Or it gives ``None``, and has them leased.
    """

    name: str
    ranges: tuple[Range, ...] | None = None
    into: Callable[[], torch.Tensor | None] | None = None


class Stream(Protocol):
    """Leases in the source's order. A context manager; leaving it ends the last lease."""

    def __iter__(self) -> Iterator[Lease]: ...
    def __next__(self) -> Lease: ...
    def __enter__(self) -> Stream: ...
    def __exit__(self, *error: object) -> None: ...
    def close(self) -> None:
        """End the running lease and every wait. May be called twice."""


@runtime_checkable
class Source(Protocol):
    """Where weights come from. ``manifest`` promises, the stream keeps the promise: each tensor once, every byte."""

    @property
    def manifest(self) -> Manifest:
        """Name, dtype and shape of every tensor. Its order says nothing about the order of arrival."""

    def leases(self, *, guard: Guard = "off") -> Stream:
        """Stream every tensor as a lease, which ends when the stream advances."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor, owned by the caller: nobody overwrites it, at no time."""

    def close(self) -> None:
        """Let go of files and memory. May be called twice."""

    def __enter__(self) -> Source: ...
    def __exit__(self, *error: object) -> None: ...


@runtime_checkable
class InMemory(Source, Protocol):
    """A source whose tensors all lie in memory already, and stay their owner's."""

    def borrow(self, name: str) -> torch.Tensor:
        """The tensor itself, to read while the source is open. Never write to it."""


@runtime_checkable
class Addressed(Source, Protocol):
    """A source that can be asked for these bytes of that tensor."""

    def position(self, name: str) -> tuple[int, int]:
        """Where the tensor lies: which file, which byte of it. Reading in this order is fastest."""

    def read(
        self,
        reads: Iterable[Read],
        *,
        pool: Pool,
        io: IOMode = "auto",
        threads: int | None = None,
        advance: Callable[[int], None] | None = None,
        stop: threading.Event | None = None,
    ) -> dict[str, int]:
        """Do all the reads; return when every byte lies where it was wished, and every sink has returned.

        Args:
            reads: in any order; they are sorted and neighbours share a read.
            pool: memory for what cannot be read in place. Never more than its bound is used.
            io: which I/O path, see ``IOMode``.
            threads: how many read at once; by default a few.
            advance: called with a number of bytes as they arrive, from any thread.
            stop: ends the reading early when set; ``Closed`` is raised. Whoever sets it calls ``pool.wake()`` too, in
                case all slots are held elsewhere.

        Returns:
            Bytes by the I/O path they came: ``"buffered"`` or ``"direct"``.

        Raises:
            CheckpointChanged: a file is not the one that was opened.
        """


@runtime_checkable
class Participant(Protocol):
    """A source whose versions are taken by a group, all or nobody. Whoever takes it into a live model asks for this."""

    def wanted(self, requests: Iterable[str | Request]) -> None:
        """Say, before the stream, what is wanted, best in this order; a name is all of its tensor.

        Whoever says so decides too. Of a tensor that is wanted in part, a lease shows the rest undefined. A source that
        can be asked for any tensor (``Addressed``, ``InMemory``) is not told.
        """

    def decision(self) -> AbstractContextManager[None]:
        """Enter it when a commit cannot fail any more: it waits for the group. Commit inside; if it raises, abort."""

    def refuse(self, error: BaseException) -> None:
        """Tell the group that this version cannot be taken, and why. Does nothing when it is decided."""


@contextmanager
@held
def refusing(source: object) -> Iterator[None]:
    """A group that waits for whoever loads is told of any failure inside, whatever it was."""
    try:
        yield
    except BaseException as error:
        if isinstance(source, Participant):
            source.refuse(error)
        raise


Wish = Request
"""The name of ``Request`` up to 0.1.0.dev0."""
Deciding = Participant
"""The name of ``Participant`` up to 0.1.0.dev0."""
