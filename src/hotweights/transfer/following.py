"""Following: how a receiver takes versions from a store or a directory, where a sender has published them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager

import torch

from .. import signals
from ..arguments import check_seconds
from ..errors import CheckpointError, Closed, PeerLost, StoreError, TransferTimeout, UsageError
from ..manifest import Manifest
from ..memory.guards import Guard
from ..memory.lease import Lease
from ..memory.pool import Pool
from ..sources.contracts import IOMode, Read, Request
from ..sources.files.source import FileSource
from ..sources.objects.run import Published, open_run
from ..sources.opening import open as open_source
from ..sources.streams import LeaseStream
from ..timeline import Timeline

INTERVAL = 1.0
"""Seconds between two looks, unless a receiver says otherwise."""


class _Offer:
    """A version that is open.

    Attributes:
        over: whether it was read to its end, or refused, so that the next one is wanted.
        pending: whether it was read to its end, and may still be refused: a commit can fail.
    """

    def __init__(self, version: Published, source: FileSource) -> None:
        self.version, self.source = version, source
        self.over = self.pending = False


@signals.held_throughout
class Following:
    """The methods of a receiver that looks for versions itself. It gives the newest only, read by ranges as files are.

    A version is taken when an update or a load has taken it, or when its stream ended. What failed is offered again,
    an interval later, unless a newer one is there by then.
    """

    address: str
    name: str
    _offer_timeout: float
    _process: int

    def _follow(
        self,
        address: str | os.PathLike[str],
        *,
        name: str,
        timeout: float,
        offer_timeout: float,
        reconnect: bool,
        interval: float | None,
        store: object,
    ) -> None:
        """Nothing is asked yet: the sender may begin later."""
        interval = INTERVAL if interval is None else interval
        check_seconds(timeout=timeout, offer_timeout=offer_timeout, interval=interval)
        self._run = open_run(address, store, timeout)
        self.address, self.name = self._run.address, name
        self._offer_timeout, self._reconnect, self._interval = offer_timeout, reconnect, interval
        self._offer: _Offer | None = None  # the version that came last
        self._taken: Published | None = None
        self._newest: Published | None = None  # what ``poll`` found last
        self._look_at = 0.0  # not before this time
        self._ended = threading.Event()
        self._process = os.getpid()

    @property
    def manifest(self) -> Manifest:
        """What is in the version that is offered. Waits for the next one when there is none.

        Raises:
            TransferTimeout: none came within ``offer_timeout``.
            PeerLost: nothing was published there yet, with ``reconnect=False``.
            StoreError: the store did not answer within ``timeout``.
            CheckpointError: the version is damaged.
        """
        return self._current().source.manifest

    @property
    def version(self) -> str | int | None:
        """The name of the version that came last; ``None`` before the first. Never waits."""
        return None if self._offer is None else self._offer.version.version

    @property
    def path(self) -> str:
        """Where the version lies that came last, for ``hotweights.open``; the run itself before the first."""
        return self.address if self._offer is None else f"{self.address}/{self._offer.version.folder}"

    def poll(self) -> str | int | None:
        """The name of the newest version, if it was not taken. Asks, and waits, once an interval at most.

        Raises:
            StoreError: the store did not answer within ``timeout``.
            Closed: it was closed.
        """
        self._check_open()
        if self._offer is not None and not self._offer.over:
            return self._offer.version.version
        found = self._look()
        return None if found is None else found.version

    def leases(self, *, guard: Guard = "off") -> LeaseStream:
        """Stream the version that is offered, or the next one. At its end the version is taken."""
        offer = self._current()
        stream = offer.source.leases(guard=guard)
        return LeaseStream(self._to_its_end(offer, stream), stop=stream.close)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor, owned by the caller. At the end the version is taken."""
        self._check_open()
        return self._tensors()

    def position(self, name: str) -> tuple[int, int]:
        """Where the tensor lies, see ``contracts.Addressed``."""
        return self._current().source.position(name)

    def file_of(self, name: str) -> str:
        """The address of the object, or the path of the file, that holds the tensor."""
        return self._current().source.file_of(name)

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
        """Do all the reads, see ``contracts.Addressed``. Nothing but their ranges is asked for."""
        source = self._current().source
        return source.read(reads, pool=pool, io=io, threads=threads, advance=advance, stop=stop)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should read of the version that came last."""
        return () if self._offer is None else self._offer.source.warnings

    def check(self) -> None:
        """See that what was read is of the version that was offered, and count it as taken.

        Raises:
            CheckpointChanged: it is not; the sender has removed it, perhaps, for newer ones.
        """
        if (offer := self._offer) is not None:
            offer.source.check()
            self._take(offer, pending=not offer.over)

    def wanted(self, requests: Iterable[str | Request]) -> None:
        """Nothing: any bytes can be asked for."""

    def time_into(self, timeline: Timeline) -> None:
        """Who reads knows what its time is spent on, but not its name."""
        timeline.receiver = self.name

    @contextmanager
    def decision(self) -> Iterator[None]:
        """Nobody decides with others here: commit inside. Leaving it without an error takes the version."""
        offer = self._current() if self._offer is None else self._offer
        yield
        self._take(offer)

    def refuse(self, error: BaseException) -> None:
        """Let the version be, which could not be taken. It is offered again, unless a newer one is there by then."""
        if (offer := self._offer) is not None and (offer.pending or not offer.over):
            self._taken = None if offer.pending else self._taken
            offer.over, offer.pending = True, False
            self._look_at = max(self._look_at, time.monotonic() + self._interval)
            offer.source.close()

    def close(self) -> None:
        """End every wait, and let go. May be called twice, and by any thread."""
        if self._process != os.getpid():
            return
        self._ended.set()
        self._run.close()
        if self._offer is not None:
            self._offer.source.close()

    def __repr__(self) -> str:
        return f"<Receiver {f'{self.name} ' if self.name else ''}from {self.address}: version {self.version!r}>"

    def _current(self) -> _Offer:
        """The version that is offered, or else the next one."""
        self._check_open()
        if self._offer is not None:
            if not self._offer.over:
                return self._offer
            self._offer.pending = False  # Whoever wants the next one was content.
        until = time.monotonic() + self._offer_timeout
        while True:
            found = self._look()
            if found is not None and (offer := self._open(found)) is not None:
                return offer
            if not self._reconnect and self._newest is None:
                raise PeerLost(f"{self.address}: nothing was published here yet")
            left = min(until, max(self._look_at, time.monotonic())) - time.monotonic()
            if left <= 0 and time.monotonic() >= until:
                raise TransferTimeout(
                    f"{self.address}: no version after {self.version!r} was published within {self._offer_timeout:g} s"
                )
            self._ended.wait(left)
            signals.deliver()
            self._check_open()

    def _look(self) -> Published | None:
        """The newest version, unless it was taken. Before the next look is due, what the last one found."""
        if time.monotonic() >= self._look_at:
            found, _ = self._run.read()
            self._newest = None if found is None else found.newest
            self._look_at = time.monotonic() + self._interval
        return None if self._newest == self._taken else self._newest

    def _open(self, version: Published) -> _Offer | None:
        """Open a version; ``None`` if it went away, and another look is due."""
        if self._offer is not None:
            self._offer.source.close()
        path, options = self._run.source(version)
        try:
            source = open_source(path, **options)
        except StoreError:
            raise
        except CheckpointError:
            found, _ = self._run.read()
            if found is None or found.newest == version:
                raise
            self._look_at = 0.0  # The sender has published others meanwhile, and removed this one.
            return None
        assert isinstance(source, FileSource)
        self._offer = _Offer(version, source)
        return self._offer

    def _to_its_end(self, offer: _Offer, stream: LeaseStream) -> Generator[Lease, None, None]:
        with stream:
            yield from stream
        self._take(offer)

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        offer = self._current()
        yield from offer.source.tensors()
        self._take(offer)

    def _take(self, offer: _Offer, *, pending: bool = False) -> None:
        offer.over, offer.pending, self._taken = True, pending, offer.version

    def _check_open(self) -> None:
        if self._process != os.getpid():
            raise UsageError(
                f"this receiver is process {self._process}'s, which forked this one; make one here: "
                f"Receiver({self.address!r})"
            )
        if self._ended.is_set():
            raise Closed("this receiver was closed")
