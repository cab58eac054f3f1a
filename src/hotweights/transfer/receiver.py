"""Receiver: a worker's end of a transfer, as its users hold it: a source whose tensors a sender sends."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from .. import signals
from ..arguments import check_choices, check_flags, check_seconds
from ..errors import Closed, UsageError
from ..manifest import Manifest
from ..memory.guards import Guard
from ..sources.contracts import Request
from ..sources.objects.run import is_run
from ..sources.streams import LeaseStream
from ..text import short
from ..timeline import Timeline
from .connection import Connection
from .endpoint import check_connectable, endpoint_of
from .following import Following
from .host_relay import HostRelay
from .inbound import Inbound
from .messages import NAME, Frame
from .pending_leases import PrivateMemory
from .publication import check_none_connects


class Receiver:
    """Takes the versions that a ``Sender`` sends, one after another. A source; a context manager.

    Asking for the manifest, or for a stream, waits for the next version when none is under way. Each version is
    streamed once.

    ``LiveModel.update`` takes part in the group's decision: the model becomes version M only if every member's
    does. ``hotweights.load`` takes part, too, but puts nothing back. For all others a version is taken when its
    stream has ended without an error. Closing the stream early refuses the version, and ``with receiver.leases() as
    stream`` closes it; ``break`` alone does not. An exception within the ``with`` of the stream or of the receiver
    refuses it too, and the sender gets its text.
    """

    def __new__(cls, address: str | os.PathLike[str], **options: Any) -> Receiver:
        """One that connects, or one that looks for what was published."""
        return object.__new__(StoreReceiver if cls is Receiver and is_run(address, options.get("store")) else cls)

    def __init__(
        self,
        address: str,
        *,
        name: str = "",
        timeout: float = 60.0,
        offer_timeout: float = 3600.0,
        keys: str | os.PathLike[str] | None = None,
        insecure: bool = False,
        reconnect: bool = True,
        relay: bool = False,
        keep: int | str | None = None,
        interval: float | None = None,
        store: object = None,
    ) -> None:
        """Nothing is connected yet: the sender may start later, and be replaced by another.

        Args:
            address: the sender's, ``unix:PATH``, ``tcps://HOST:PORT``, ``ray:NAME``, or ``env:`` for what torchrun,
                Slurm or ``HOTWEIGHTS_ADDRESS`` says, docs/hosts.md. Or where a sender publishes, docs/objects.md:
                ``s3://BUCKET/RUN``, another store or web server, ``file:///DIRECTORY``, or a ``Path``. Only what a plan
                needs of a version is read then.
            name: for people, such as ``"rank0"``: it stands in the sender's errors and reports.
            timeout: seconds that each single wait within an update may take: also that for the next sender, when this
                one is lost and nobody here knows what it decided.
            offer_timeout: seconds to wait for the next version.
            keys: the directory of the job's keys, which ``hotweights keys`` makes; for ``tcps:``. With ``ray:``
                the sender hands them out.
            insecure: go without keys in a network where anybody may send and take weights.
            reconnect: whether that wait goes on when no sender is there, for one that is yet to come. If not, it ends
                with ``PeerLost`` at once.
            relay: take part through a relay of this host, for ``tcps:``. The first receiver starts it, as a process of
                its own; all others that say the same use it, so that the network is crossed once for all of them. It
                ends ten seconds after the last one.
            keep: with ``relay``: bytes of memory, or such as ``"40GB"``, in which it keeps the last version for workers
                that come later, see ``Relay``. It counts of the one that starts it.
            interval: where versions are published: seconds between two looks, 1 by default.
            store: of an address in a store: options, or a store of its package, see ``hotweights.open``.
        """
        if interval is not None:
            raise UsageError(f"interval= is for places where versions are published; {address!r} is none; leave it out")
        check_flags(insecure=insecure, reconnect=reconnect, relay=relay)
        check_seconds(timeout=timeout, offer_timeout=offer_timeout)
        _check_name(name)
        self.address = address
        self.name = name
        if keep is not None and not relay:
            raise UsageError("keep= is for relay=True: this host's relay keeps versions; say that too, or leave it out")
        check_connectable(address)
        self._relay = HostRelay(address, keys=keys, insecure=insecure, keep=keep) if relay else None
        endpoint = self._relay or endpoint_of(address, keys=keys, insecure=insecure)
        self._connection = Connection(endpoint, name, reconnect=reconnect)
        self._timeout, self._offer_timeout = timeout, offer_timeout
        self._private = PrivateMemory()
        self._inbound: Inbound | None = None  # the version that came last
        self._closed = False
        self._process = os.getpid()

    @property
    def manifest(self) -> Manifest:
        """What is in the version that is offered or under way. Waits for the next one when there is none.

        Raises:
            TransferTimeout: none came within ``offer_timeout``.
            PeerLost: no sender is there, with ``reconnect=False``.
            ProtocolError: the sender speaks another protocol, or belongs to another user.
        """
        return self._offered().manifest

    @property
    def version(self) -> str | int | None:
        """The name of the version that came last; ``None`` before the first. Never waits."""
        return None if self._inbound is None else self._inbound.member.version

    @property
    def in_doubt(self) -> bool:
        """Whether it has voted for a version, lost its sender, and waits for somebody who knows the decision."""
        return self._inbound is not None and self._inbound.member.in_doubt

    def poll(self) -> str | int | None:
        """The name of the version that is offered or under way, if one is. Never waits.

        Where it returns a name, ``manifest`` and ``LiveModel.update`` need not wait for an offer. The sender waits for
        the answer from its offer on, ``timeout`` seconds at most: poll more often than that.

        Raises:
            TransferError: the sender speaks another protocol, or nobody can connect there.
            Closed: it was closed.
        """
        self._check_open()
        inbound = self._inbound
        if inbound is None or inbound.member.over:
            inbound = self._polled()
        return None if inbound is None else inbound.member.version

    @signals.watched
    def _polled(self) -> Inbound | None:
        frame = self._connection.poll()
        return None if frame is None else self._came(frame)

    def connect(self, seconds: float) -> bool:
        """Connect before a version is offered. Returns whether the sender has said welcome within these seconds.

        It says so while it sends, and when it is asked who is ``connected``. A relay says so at any time. Nothing needs
        this: whoever waits for a version connects too.

        Raises:
            TransferError: as ``poll``.
            Closed: it was closed.
        """
        check_seconds(seconds=seconds)
        self._check_open()
        return self._connection.welcomed(seconds)

    def leases(self, *, guard: Guard = "off") -> LeaseStream:
        """Stream the version that is offered, or the next one, in the sender's order.

        A lease lies in one of the sender's slots, which is filled again when all leases in it have ended, here and at
        all other receivers. With digests or a guard, and for tensors larger than a slot, it lies in the receiver's own
        memory, which is reused for the next tensor.

        Raises, while it is iterated:
            TransferAborted: the sender, or the group, gave this version up; the message says why.
            TransferError: the sender is lost, or what was copied is not what it held.
        """
        check_choices(guard=(guard, Guard))
        return _VersionStream(self._offered(), guard)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor, owned by the caller.

        Raises:
            Closed: it was closed.
            TransferError: as ``leases``.
        """
        self._check_open()
        return self._tensors()

    def wanted(self, requests: Iterable[str | Request]) -> None:
        """Say before the stream which tensors are wanted, or which ranges of them, best in this order.

        After that the end of the stream consents to nothing: use ``decision``. The sender may use another order.

        Raises:
            UsageError: something is wanted that is not offered, or the stream has begun.
        """
        self._offered().want(requests)

    def time_into(self, timeline: Timeline) -> None:
        """Note in ``timeline`` what the version that is offered takes: waits and copies. ``LiveModel`` calls it."""
        timeline.receiver = self.name
        self._offered().member.timeline = timeline

    def decision(self) -> AbstractContextManager[None]:
        """Entering waits until the group has decided; inside, commit. Leaving says that this was done.

        Ctrl-C ends the wait while the decision can still be that nobody commits; from there on it waits until the
        commit is done, and is raised then. A second one does not wait.

        Raises:
            TransferAborted: the group decided not to.
            TransferError: the sender is lost and had not decided: nobody takes the version.
        """
        return self._offered().member.decision()

    def refuse(self, error: BaseException) -> None:
        """Tell the sender that this version cannot be taken, and why. Does nothing when none is under way."""
        if self._inbound is not None:
            self._inbound.member.refuse(error)

    def close(self) -> None:
        """Refuse what is under way, end every wait, let go. May be called twice, and by any thread.

        A commit that the group decided on is not cut short: if another thread is at it, this waits for its end.
        """
        if self._process != os.getpid():  # A forked child owns nothing of it, and a lock may never be let go there.
            return
        self._closed = True
        self._connection.stop()
        inbound = self._inbound
        if inbound is not None and not inbound.member.over:
            inbound.member.refuse(Closed("the receiver was closed"))
        self._connection.close()
        if self._relay is not None:
            self._relay.close()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *error: object) -> None:
        if isinstance(error[1], BaseException):
            self.refuse(error[1])
        self.close()

    def __repr__(self) -> str:
        return f"<Receiver {f'{self.name} ' if self.name else ''}from {self.address}: version {self.version!r}>"

    def _offered(self) -> Inbound:
        """The version that is under way, or else the next one."""
        self._check_open()
        inbound = self._inbound
        if inbound is not None and inbound.member.aborted:
            # The consumer never said that it had put everything back, and the sender would wait for that.
            inbound.member.refuse(UsageError("refuse was not called"))
        return self._next() if inbound is None or inbound.member.over else inbound

    @signals.watched
    def _next(self) -> Inbound:
        """Wait for the next version. A signal between its offer and this note would lose it."""
        frame = self._connection.offer(self._offer_timeout)
        return self._came(frame)

    @signals.held
    def _came(self, frame: Frame) -> Inbound:
        inbound = self._inbound = Inbound(self._connection, frame, self._private, self._timeout)
        return inbound

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        with self.leases() as stream:
            for lease in stream:
                yield lease.name, lease.own()

    def _check_open(self) -> None:
        if self._process != os.getpid():
            raise UsageError(
                f"this receiver is process {self._process}'s, which forked this one; make one here: "
                f"Receiver({self.address!r})"
            )
        if self._closed:
            raise Closed("this receiver was closed")


class StoreReceiver(Following, Receiver):
    """What ``Receiver`` makes for an address at which a sender publishes."""

    def __init__(
        self,
        address: str | os.PathLike[str],
        *,
        name: str = "",
        timeout: float = 60.0,
        offer_timeout: float = 3600.0,
        keys: str | os.PathLike[str] | None = None,
        insecure: bool = False,
        reconnect: bool = True,
        relay: bool = False,
        keep: int | str | None = None,
        interval: float | None = None,
        store: object = None,
    ) -> None:
        """See ``Receiver``."""
        check_none_connects(
            address, keys=(keys, None), insecure=(insecure, False), relay=(relay, False), keep=(keep, None)
        )
        check_flags(reconnect=reconnect)
        _check_name(name)
        self._follow(
            address,
            name=name,
            timeout=timeout,
            offer_timeout=offer_timeout,
            reconnect=reconnect,
            interval=interval,
            store=store,
        )


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise UsageError(f"name= is a str, such as 'rank0'; found {short(name)}, which is of {type(name).__name__}")
    if len(name) > NAME or not name.isprintable():
        raise UsageError(f"name= is at most {NAME} printable characters; found {name[:NAME]!r}")


class _VersionStream(LeaseStream):
    """Leases of one version. Leaving it early refuses the version; an exception inside does so with its text."""

    def __init__(self, inbound: Inbound, guard: Guard) -> None:
        self._member = inbound.member
        super().__init__(inbound.leases(guard), stop=self._member.cancel)

    def close(self) -> None:
        """End the running lease and every wait. May be called twice."""
        super().close()
        self._member.leave()

    def __exit__(self, *error: object) -> None:
        if isinstance(error[1], BaseException):
            self._member.fail(error[1])
        super().__exit__(*error)


# What tools and editors show of the class: ``__new__`` takes what ``__init__`` takes.
Receiver.__new__.__wrapped__ = Receiver.__init__  # type: ignore[attr-defined]
