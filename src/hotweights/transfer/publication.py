"""Publication: how a sender publishes versions in a store or a directory, for workers that come and look."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable

from .. import signals
from ..arguments import check_count
from ..errors import AddressTaken, HotweightsError, UsageError
from ..sources.contracts import Source, warnings_of
from ..sources.objects.run import Published, new_version, open_run, pointer
from ..sources.save import save
from ..timeline import Timeline
from .report import SendReport

KEEP = 3
"""Versions that are kept, unless a sender says otherwise."""


@signals.held_throughout
class Publication:
    """A place that one sender publishes at. It takes the place over from whoever published there before.

    A version is written to a folder of its own first; then the pointer is put over the one that this sender wrote
    last. Whatever is cut short before that leaves the version before, and whatever comes after it the new one.

    Attributes:
        address: of the place.
        state: what it does, in words.
    """

    state = "publishes"

    def __init__(self, address: str | os.PathLike[str], *, keep: int | None, store: object, timeout: float) -> None:
        """Take the place over.

        Raises:
            AddressTaken: another sender began at the same moment.
            StoreError: the store cannot be written to, or keeps no conditions.
            UsageError: it is no such place.
        """
        if keep is not None:
            check_count(1, keep=keep)
        self._keep = KEEP if keep is None else keep
        self._sender = secrets.token_hex(8)
        self._run = open_run(address, store, timeout, writes=True)
        self.address = self._run.address
        try:
            found, tag = self._run.read()
            self._pointer = pointer(self._sender, found.versions if found else ())
            self._tag = self._run.write(self._pointer, tag)
            self._run.probe()
            self._clear()
        except BaseException:
            self._run.close()
            raise

    def send(self, source: Source, version: str | int, timeline: Timeline, check: Callable[[], object]) -> SendReport:
        """Publish one version. ``check`` is called when it was read; if it raises, workers have the version before.

        Raises:
            AddressTaken: another sender has taken the place over. Workers have its versions.
            SaveError, StoreError: it could not be written. Workers have the version before.
            Exception: the source failed. Workers have the version before.
        """
        self._look_again()
        newest = self._pointer.newest
        new = new_version(newest.number + 1 if newest else 1, version)
        try:
            with timeline.event("save"):
                saved = save(source, self._run.target(new))
                check()
            with timeline.event("publish"):
                kept = (*self._pointer.versions, new)[-self._keep :]
                after = pointer(self._sender, kept)
                before, self._pointer = self._pointer, after  # Should the answer be lost, ``_look_again`` compares.
                self._tag = self._run.write(after, self._tag)
        except BaseException as error:
            self._give_up(new, error)
            raise
        with timeline.event("clear"):
            gone = [each.folder for each in before.versions if each not in kept]
            warnings = [*saved.warnings, *self._remove(gone)]
        return SendReport(
            version=version,
            committed=(),
            lost={},
            problems={},
            tensors=len(source.manifest),
            nbytes=saved.nbytes,
            seconds=sum(event.seconds for event in timeline.events),
            waited={},
            warnings=(*warnings_of(source), *warnings),
            events=tuple(timeline.events),
            published=f"{self.address}/{new.folder}",
        )

    def _look_again(self) -> None:
        """Know the pointer as it is: the answer to the last ``write`` may have been lost."""
        found, tag = self._run.read()
        if found is None or found.sender != self._sender:
            raise AddressTaken(
                f"{self.address}: another sender has taken this place over"
                if found
                else f"{self.address}: somebody removed what was published here; make a new sender"
            )
        self._pointer, self._tag = found, tag

    def _give_up(self, new: Published, error: BaseException) -> None:
        """Remove what nobody will read. A sender that was overtaken is told so, whatever it met."""
        try:
            self._look_again()
        except AddressTaken as overtaken:
            self._remove([new.folder])
            if isinstance(error, Exception):
                raise overtaken from error
        except HotweightsError:
            pass  # It is not known who reads it. A later sender knows.
        else:
            if new not in self._pointer.versions:
                self._remove([new.folder])

    def _clear(self) -> None:
        """Remove what senders that were killed have left."""
        kept = {each.folder for each in self._pointer.versions}
        self._remove([folder for folder in self._run.folders() if folder not in kept])

    def _remove(self, folders: list[str]) -> list[str]:
        """Remove folders. Returns what failed: the next sender here tries again."""
        failed = []
        for folder in folders:
            try:
                self._run.remove(folder)
            except FileNotFoundError:
                continue
            except (HotweightsError, OSError) as error:
                failed.append(f"{self.address}/{folder}: is not read any more, and could not be removed: {error}")
        return failed

    def stop(self) -> None:
        """End every request, in any thread."""
        self._run.close()

    def close(self) -> None:
        """Let go of the store. What was published stays. May be called twice."""
        self._run.close()


def check_none_connects(address: object, **options: tuple[object, object]) -> None:
    """Raise ``UsageError`` if an option is another than its default, and is about those who connect."""
    if given := [name for name, (value, default) in options.items() if value != default]:
        raise UsageError(
            f"{', '.join(f'{name}=' for name in given)}: nobody connects to {address}, where versions are published "
            "for whoever looks; leave it out"
        )
