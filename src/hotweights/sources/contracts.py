"""What sources promise, as four contracts, and the requests that they are given. No source lives here.

Every source is a ``Source``: it can be streamed. Some can do more: an ``Addressed`` one reads any bytes of any tensor
in any order, an ``InMemory`` one lends the tensors themselves, a ``Participant`` takes part in a group's decision.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import msgspec
import torch

# Not typing's own: up to Python 3.11 its isinstance reads every property, and a receiver's manifest waits for a sender.
from typing_extensions import Protocol, runtime_checkable

from ..manifest import Manifest
from ..memory.devices import Event
from ..memory.guards import Guard
from ..memory.lease import Lease
from ..memory.pool import Pool
from ..ranges import Range
from ..signals import held
from ..timeline import Timeline

IOMode = Literal["auto", "buffered", "direct"]
"""How files are read: ``buffered`` through the page cache, ``direct`` around it, ``auto`` by what is cached."""

Sink = Callable[[torch.Tensor], "Event | None"]
"""Is given borrowed bytes (``uint8 [n]``), which are valid until it returns, or until the event it returns happened."""


class Read(msgspec.Struct, frozen=True, gc=False):
    """One read of an ``Addressed`` source: the bytes ``start .. start + nbytes`` of a tensor, and where they go.

    Attributes:
        name: which tensor.
        start: first byte within the tensor, row-major.
        nbytes: how many.
        into: a contiguous host tensor of ``nbytes`` bytes that is filled, or a sink that is called once,
            possibly from another thread; what goes to a sink must fit into one slot of the pool.
    """

    name: str
    start: int
    nbytes: int
    into: torch.Tensor | Sink


class Request(msgspec.Struct, frozen=True, gc=False):
    """What is wanted of one tensor, said to a ``Participant`` before the stream: all of it, or some ranges.

    Attributes:
        name: which tensor.
        ranges: which bytes, ascending and apart; ``None`` for all.
        into: for a single range, where its bytes may be put as they are. The stream calls it once, when the first of
            them are there. It returns a contiguous ``uint8`` host tensor of that size, which stays the caller's; the
            lease then says ``placed``. Or it returns ``None``, and the bytes are leased as usual.
        rounded: whoever asks casts all of this to that dtype, and uses it for nothing else. The values that come may
            be rounded to it before; what is leased has the manifest's dtype all the same.
    """

    name: str
    ranges: tuple[Range, ...] | None = None
    into: Callable[[], torch.Tensor | None] | None = None
    rounded: torch.dtype | None = None


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
    """Where weights come from. The manifest promises tensors; a stream brings each of them once, with every byte."""

    @property
    def manifest(self) -> Manifest:
        """Name, dtype and shape of every tensor. Tensors may arrive in another order."""

    def leases(self, *, guard: Guard = "off") -> Stream:
        """Stream every tensor as a lease, which ends when the stream advances."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor. It is the caller's: nobody else ever overwrites it."""

    def close(self) -> None:
        """Let go of files and memory. May be called twice."""

    def __enter__(self) -> Source: ...
    def __exit__(self, *error: object) -> None: ...


@runtime_checkable
class InMemory(Source, Protocol):
    """A source whose tensors all lie in memory already. They stay their owner's."""

    def borrow(self, name: str) -> torch.Tensor:
        """The tensor itself, to read while the source is open. Never write to it."""


@runtime_checkable
class Addressed(Source, Protocol):
    """A source that reads any bytes of any tensor, in any order."""

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
        """Do all the reads; return when every byte lies where it belongs, and every sink has returned.

        Args:
            reads: in any order; they are sorted and neighbours share a read.
            pool: memory for what cannot be read in place; nothing beyond its bound is taken.
            io: which I/O path, see ``IOMode``.
            threads: how many read at once; by default a few.
            advance: called with a number of bytes as they arrive, from any thread.
            stop: ends the reading early when set; ``Closed`` is raised. Whoever sets it calls ``pool.wake()`` too:
                a wait for a slot would not see it at once.

        Returns:
            How many bytes came by each I/O path, ``"buffered"`` and ``"direct"``.

        Raises:
            CheckpointChanged: a file is not the one that was opened.
        """


@runtime_checkable
class OnDisk(Source, Protocol):
    """A source whose bytes lie in files, which others may write to while they are read."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should read: signs that the files are of two versions."""

    def check(self) -> None:
        """See that every file is the one that was opened, unchanged. Called when all is read, before it counts.

        Streams do so at their end.

        Raises:
            CheckpointChanged: one is not, so what was read may be of two versions.
        """


def warnings_of(source: object) -> tuple[str, ...]:
    """What a report of reading ``source`` must say; nothing where it does not lie in files."""
    return source.warnings if isinstance(source, OnDisk) else ()


@runtime_checkable
class Participant(Protocol):
    """A source that takes part in a two-phase commit: all members of its group take a version, or nobody does.

    Whoever loads from one calls ``wanted``, streams, and then enters ``decision`` or calls ``refuse``.
    """

    def wanted(self, requests: Iterable[str | Request]) -> None:
        """Say, before the stream, what is wanted, best in this order. A name stands for all of its tensor.

        Whoever calls this must decide too. Where only ranges of a tensor are wanted, the other bytes of its lease are
        undefined. It is not called of a source that can be asked for any tensor (``Addressed``, ``InMemory``).
        """

    def decision(self) -> AbstractContextManager[None]:
        """Enter it when a commit cannot fail any more: it waits for the group. Commit inside; if it raises, abort."""

    def refuse(self, error: BaseException) -> None:
        """Tell the group that this version cannot be taken, and why. Does nothing once the group has decided."""


@runtime_checkable
class Timed(Protocol):
    """A source that tells what it spends its time on: waiting for others, say."""

    def time_into(self, timeline: Timeline) -> None:
        """Note in ``timeline`` what the version that is offered takes. Called before its stream."""


@contextmanager
@held
def refusing(source: object) -> Iterator[None]:
    """Whatever fails inside, the source's group is told: otherwise it would wait for this member until a deadline."""
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
