"""Sender: the trainer's end of a transfer, as its users hold it. The group and the round do the work."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from ..errors import Closed, UnknownName, UsageError
from ..manifest import Manifest
from ..memory.wrappers import is_wrapper
from ..progress import progress
from ..sources.contracts import InMemory, Source
from ..sources.iterator import from_iterator
from ..sources.opening import AnySource, is_pairs, opened
from ..sources.state_dict import StateSource
from .address import path_of
from .copying import wrapped
from .outbound import Outbound
from .peers import Group
from .report import SendReport
from .slots import WriteSlots

OnLost = Literal["abort", "drop"]
"""What becomes of an update when a receiver is lost: nobody takes it, or the others do."""

Sendable = AnySource | Iterable[tuple[str, torch.Tensor]]


class Sender:
    """Sends versions to the receivers on this host that connect to an address. A context manager.

    Bytes go through a few slots of shared memory, filled once for all receivers. One thread sends at a time; between
    two calls of ``send`` nothing runs, and whoever connects waits.
    """

    def __init__(
        self,
        address: str,
        *,
        receivers: int = 1,
        slots: int = 4,
        slot_nbytes: int = 4 * 1024 * 1024,
        digests: bool = True,
        timeout: float = 60.0,
        on_lost: OnLost = "abort",
    ) -> None:
        """Take the address. Nobody is waited for yet.

        Args:
            address: ``unix:PATH``. The directory must be this user's alone; one that does not exist is made so.
            receivers: how many must be there before anything is sent. All that are there take part.
            slots: pieces of shared memory; two are enough for filling one while another is read.
            slot_nbytes: bytes of each; best when all of them fit into the last cache. Larger tensors are split.
            digests: whether receivers compare what they copied with what this side held.
            timeout: seconds that each single wait may take.
            on_lost: what becomes of an update when a receiver dies, fails or does not answer, see ``OnLost``.

        Raises:
            AddressTaken: another sender is there; says which process.
            UsageError: the address or an option is wrong.
        """
        if on_lost not in get_args(OnLost):
            raise UnknownName("on_lost", on_lost, get_args(OnLost))
        if receivers < 1 or not timeout > 0:
            raise UsageError(f"at least one receiver and some time are needed; got {receivers} and {timeout:g} s")
        path = path_of(address)
        self.address = address
        self._receivers, self._timeout, self._digests = receivers, timeout, digests
        self._drop = on_lost == "drop"
        self._slots = WriteSlots(slots, slot_nbytes)
        try:
            self._group = Group(path, self._slots, timeout)
        except BaseException:
            self._slots.close()
            raise
        # Never the same twice, and after those of a sender that was there before only by luck: receivers take the
        # first as it comes and refuse what is not larger from then on.
        self._update = secrets.randbits(62)
        self._sending = threading.Lock()
        self._thread: int | None = None  # the one that sends; it alone changes this
        self._closed = False

    def send(
        self,
        tensors: Sendable,
        *,
        version: str | int,
        manifest: Manifest | None = None,
        receivers: int | None = None,
        show_progress: bool | None = None,
    ) -> SendReport:
        """Send one version; return when every receiver has it.

        A tensor is read only while this runs: before it returns nobody may change it, afterwards everybody may.

        Args:
            tensors: a mapping, a module, a source or a path; or pairs of name and tensor, which go out in their own
                order. A generator without ``manifest`` is read to its end first, and its tensors are kept until then.
            version: its name.
            manifest: what a generator will give.
            receivers: how many must be there this time.
            show_progress: whether to draw a progress bar; by default on a terminal.

        Raises:
            TransferAborted: nobody has it, and why; a receiver's problem stands under its name.
            TransferIncomplete: some have it, some were lost after that was decided.
            TransferTimeout: not enough receivers came.
            UsageError: the tensors cannot be sent: two of one name, for example. Nobody was told of them.
            Exception: the tensors could not be had. Nobody has the version.
        """
        _check_version(version)
        with self._alone(), _opened(tensors, manifest) as source:
            _check_bare(source)
            members = self._group.gather(self._receivers if receivers is None else receivers)
            self._update += 1
            with progress("sending", source.manifest.nbytes, show=show_progress) as advance:
                return Outbound(
                    self._group,
                    members,
                    self._slots,
                    update=self._update,
                    timeout=self._timeout,
                    digests=self._digests,
                    drop=self._drop,
                    advance=advance,
                ).run(source, version)

    def close(self) -> None:
        """Let go of the address and the memory. May be called twice, and by any thread.

        A ``send`` that runs is aborted. In its own thread, by a handler of a signal or by what is sent, this returns at
        once, and ``send`` lets go when it ends.
        """
        self._closed = True
        self._group.stop()
        if self._thread == threading.get_ident():  # It would wait for itself.
            return
        with self._sending:  # Whoever sends is on the way out: every wait of it has ended.
            self._group.close()
            self._slots.close()

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Sender at {self.address}: {'closed' if self._closed else f'{len(self._group.peers)} receivers'}>"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._sending.acquire(blocking=False):
            if self._closed:
                raise Closed("this sender was closed")
            raise UsageError("this sender is sending; one version at a time")
        try:
            if self._closed:
                raise Closed("this sender was closed")
            self._thread = threading.get_ident()
            yield
        finally:
            self._thread = None
            self._sending.release()
            if self._closed:
                self.close()


@contextmanager
def _opened(tensors: Sendable, manifest: Manifest | None) -> Iterator[Source]:
    """What is to be sent, as a source; one that is made here is closed here."""
    if not is_pairs(tensors):
        with opened(tensors) as source:
            yield source
    elif manifest is not None:
        with from_iterator(tensors, manifest) as promised:
            yield promised
    else:
        with StateSource(_collected(tensors)) as state:
            yield state


def _collected(pairs: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors themselves, not copies."""
    found: dict[str, torch.Tensor] = {}
    twice = set()
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise UsageError(f"a mapping or pairs of name and tensor can be sent; this holds a {type(pair).__name__}")
        name, tensor = pair
        if name in found:
            twice.add(name)
        found[name] = tensor
    if twice:
        raise UsageError(f"two tensors have one name: {', '.join(sorted(twice))}")
    return found


def _check_bare(source: Source) -> None:
    if isinstance(source, InMemory):
        found = ((name, source.borrow(name)) for name in source.manifest)
        if odd := [f"{name}: {wrapped(tensor)}" for name, tensor in found if is_wrapper(tensor)]:
            raise UsageError("; ".join(odd[:10]) + (f"; and {len(odd) - 10} more" if len(odd) > 10 else ""))


def _check_version(version: object) -> None:
    if not isinstance(version, (str, int)) or isinstance(version, bool):
        raise UsageError(f"a version is a str or an int; this is a {type(version).__name__}")
