"""Update: one attempt to take a live model from version N to M, as its users hold it. The work is done beside it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from ..arguments import check_version
from ..errors import UsageError
from ..manifest import Manifest
from ..memory.devices import record_event
from .attempt import Attempt
from .report import UpdateReport


class Owner(Protocol):
    """What an update asks of the live model that it belongs to."""

    def failing(self, work: Attempt) -> AbstractContextManager[None]:
        """Any failure inside aborts the update, and is told as such."""

    def prepare(self, work: Attempt) -> None:
        """Finish it, prove it; it may be committed then."""

    def commit(self, work: Attempt, version: str | int | None) -> UpdateReport:
        """Make it version M."""

    def abort(self, work: Attempt) -> None:
        """Make it version N again. May be called twice."""

    def over(self, work: Attempt) -> bool:
        """Whether it has committed or aborted."""


class Update:
    """One attempt. A context manager; leaving it without ``commit`` aborts. Made by ``LiveModel.begin``.

    ``feed`` any number of times, then ``prepare``, then ``commit``. Until then version N is live, byte for byte: with
    ``atomic="staged"`` it serves on, with ``"journal"`` it is written over and every failure puts it back. All methods
    but ``abort`` raise ``UpdateAborted`` when something fails, and the update is over.
    """

    def __init__(self, owner: Owner, work: Attempt) -> None:
        self._owner = owner
        self._work = work
        self._prepared = False

    @property
    def manifest(self) -> Manifest:
        """What it must be fed: names, dtypes and shapes."""
        return self._work.manifest

    @property
    def open_nbytes(self) -> int:
        """Device memory that layers take which have begun and lack tensors."""
        return self._work.open_nbytes

    def feed(self, pairs: Iterable[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor]) -> None:
        """Take tensors, in any order and any number of calls. They may be borrowed: nothing is kept but by copy.

        A tensor is read until the iterator is advanced, on a device until its queue is done.

        Raises:
            UpdateAborted: a tensor is unknown, of another dtype or shape than promised, or comes twice; it lies in the
                model's own memory, and that is written in place; or the iterator raised.
        """
        self._check("feed")
        if self._prepared:
            raise UsageError("this update is prepared; it cannot be fed any more")
        with self._owner.failing(self._work):
            for name, tensor in pairs.items() if isinstance(pairs, Mapping) else pairs:
                self._work.check_apart(name, tensor)
                devices = self._work.take(name, tensor, tensor.clone)
                _wait_for(devices | {tensor.device})  # Behind the next tensor this one may be written over.

    def prepare(self) -> None:
        """See that everything came, finish what waited, prove addresses and aliases. Version N is still live.

        Raises:
            UpdateAborted: something is missing, or was moved.
        """
        self._check("prepare")
        if not self._prepared:
            self._owner.prepare(self._work)
            self._prepared = True

    def commit(self, version: str | int | None = None) -> UpdateReport:
        """Make it version M. Nothing can fail but the hooks, and they run after it.

        Args:
            version: its name; by default the number of commits.

        Raises:
            CommitHookError: version M is live, and a hook failed.
        """
        self._check("commit")
        check_version(version)
        self.prepare()
        return self._owner.commit(self._work, version)

    def abort(self) -> None:
        """Make it version N again, whatever was fed. May be called twice, and does nothing after a commit."""
        self._owner.abort(self._work)

    def __enter__(self) -> Update:
        return self

    def __exit__(self, *error: object) -> None:
        self.abort()

    def __del__(self) -> None:
        if not self._owner.over(self._work):
            warnings.warn(
                "an update was neither committed nor aborted; it is aborted now", ResourceWarning, stacklevel=2
            )
            self.abort()

    def _check(self, verb: str) -> None:
        if self._owner.over(self._work):
            raise UsageError(f"this update is over; it cannot {verb}")


def _wait_for(devices: set[torch.device]) -> None:
    for device in devices:
        event = record_event(device)
        if isinstance(event, torch.Event):
            event.synchronize()
