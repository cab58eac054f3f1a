"""Receiver: a worker's end of a transfer: an ordered source whose tensors a sender sends. The parts beside it work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from ..arguments import check_choices
from ..errors import Closed, UsageError
from ..manifest import Manifest
from ..memory.guards import Guard
from ..signals import held_back
from ..sources.contracts import Request
from ..sources.streams import LeaseStream
from .address import path_of
from .arrival import Private
from .connection import Connection
from .inbound import Inbound


class Receiver:
    """Takes the versions that a ``Sender`` on this host sends, one after another. A source; a context manager.

    Whatever asks for the manifest, or streams, when no version is under way waits for the next one. Each version is
    streamed once. ``LiveModel.update`` takes part in the group's decision: the model becomes version M only if
    every member's does; ``hotweights.load`` too, but it puts nothing back. For all others a version is taken when
    its stream has ended without an error; who leaves it early refuses it, and so does an exception within its
    ``with``, or that of the receiver, whose text the sender gets.
    """

    def __init__(self, address: str, *, timeout: float = 60.0, offer_timeout: float = 3600.0) -> None:
        """Nothing is connected yet; the sender may start later, and start again.

        Args:
            address: as the sender's, ``unix:PATH``.
            timeout: seconds that each single wait within an update may take.
            offer_timeout: seconds to wait for the next version.
        """
        if not (timeout > 0 and offer_timeout > 0):
            raise UsageError(f"waits take some time; got {timeout:g} and {offer_timeout:g} s")
        self.address = address
        self._uplink = Connection(path_of(address))
        self._timeout, self._offer_timeout = timeout, offer_timeout
        self._private = Private()
        self._taking: Inbound | None = None
        self._closed = False

    @property
    def manifest(self) -> Manifest:
        """That of the version that is offered or under way. Waits for the next one when there is none.

        Raises:
            TransferTimeout: none came.
            ProtocolError: the sender is of another protocol, or another user's.
        """
        return self._offered().manifest

    @property
    def version(self) -> str | int | None:
        """The name of the version that came last; ``None`` before the first. Never waits."""
        return None if self._taking is None else self._taking.version

    def leases(self, *, guard: Guard = "off") -> LeaseStream:
        """Stream the version that is offered, or the next one, in the sender's order.

        A lease lies in the sender's slot, which is filled again when all leases in it have ended, here and at all other
        receivers. With digests or a guard, and for tensors larger than a slot, it lies in memory of the receiver's own
        that is used again.

        Raises, while it is iterated:
            TransferAborted: the sender, or the group, gave this version up; the message says why.
            TransferError: the sender is lost, or what was copied is not what it held.
        """
        check_choices(guard=(guard, Guard))
        return _Stream(self._offered(), self._uplink, guard)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor, owned by the caller.

        Raises:
            Closed: it was closed.
            TransferError: as ``leases``.
        """
        self._check_open()
        return self._tensors()

    def wanted(self, requests: Iterable[str | Request]) -> None:
        """Say before the stream what is wanted, tensors or ranges of them, in which order; whoever does also decides.

        The order is a request. Then the end of the stream consents to nothing: use ``decision``.

        Raises:
            UsageError: something is wanted that is not offered.
        """
        self._offered().want(requests)

    @contextmanager
    def decision(self) -> Iterator[None]:
        """Wait until the group has decided; inside, commit. Leaving says that this was done.

        Ctrl-C ends the wait while the decision can still be that nobody commits; from there on it waits until the
        commit is done, and is raised then. A second one does not wait.

        Raises:
            TransferAborted: the group decided not to.
            TransferError: the sender is lost and had not decided: nobody takes the version.
        """
        taking = self._offered()
        with held_back(self._uplink.wake) as interruption, taking.deciding():
            taking.prepare(interruption)
            try:
                yield
            except BaseException as error:
                taking.done(error)
                raise
            taking.done(None)

    def refuse(self, error: BaseException) -> None:
        """Tell the sender that this version cannot be taken, and why. Does nothing when none is under way."""
        if self._taking is not None:
            self._taking.refuse(error)

    def close(self) -> None:
        """Refuse what is under way, end every wait, let go. May be called twice, and by any thread.

        A commit that the group decided on is not cut short: another thread's is waited for.
        """
        self._closed = True
        self._uplink.stop()
        taking = self._taking
        if taking is not None and not taking.over:
            taking.refuse(Closed("the receiver was closed"))
        self._uplink.close()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *error: object) -> None:
        if isinstance(error[1], BaseException):
            self.refuse(error[1])
        self.close()

    def __repr__(self) -> str:
        return f"<Receiver from {self.address}: version {self.version!r}>"

    def _offered(self) -> Inbound:
        self._check_open()
        if self._taking is not None and self._taking.aborted:  # Nobody refused what the group had given up.
            self._taking.refuse(UsageError("refuse was not called"))
        if self._taking is None or self._taking.over:
            frame = self._uplink.offer(self._offer_timeout)
            self._taking = Inbound(self._uplink, frame, self._private, self._timeout)
        return self._taking

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        with self.leases() as stream:
            for lease in stream:
                yield lease.name, lease.own()

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("this receiver was closed")


class _Stream(LeaseStream):
    """Leases of one version. Leaving it early refuses the version, an exception inside with its text."""

    def __init__(self, taking: Inbound, uplink: Connection, guard: Guard) -> None:
        self._taking = taking
        self._wake = uplink.wake
        super().__init__(taking.leases(guard), stop=self._cancel)

    def close(self) -> None:
        """End the running lease and every wait. May be called twice."""
        super().close()
        self._taking.leave()

    def __exit__(self, *error: object) -> None:
        if isinstance(error[1], BaseException):
            self._taking.fail(error[1])
        super().__exit__(*error)

    def _cancel(self) -> None:
        self._taking.cancelled = True
        self._wake()
