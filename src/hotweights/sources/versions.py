"""Versions: the checkpoints that appear in a directory, one after the other, each when its writer is done with it."""

from __future__ import annotations

import fnmatch
import logging
import os
import re
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError, HotweightsError
from ..notices import log
from ..text import some
from .dcp.place import BYTES as DCP_BYTES
from .dcp.place import NAME as DCP_NAME
from .dcp.place import DcpPlace, dcp_place, unfinished_dcp
from .files.listing import list_checkpoint
from .objects.run import Pointer, Published, Run

WEIGHTS, INDEX = ".safetensors", ".safetensors.index.json"
"""How the names of files of weights end, and of what names several."""


class Version(NamedTuple):
    """A checkpoint whose writer is done with it: a source for ``update``, ``load`` and ``open``.

    Attributes:
        name: its name. One that is written anew in its own folder has the name that it had.
        path: where it lies; a ``str`` is an address.
        written: when its newest file was written, in seconds since the epoch; 0 where a sender has published it.
    """

    name: str
    path: Path | str
    written: float = 0.0

    def __fspath__(self) -> str:
        """The path, as text: whatever takes a path takes a version."""
        return os.fspath(self.path)


class Status(NamedTuple):
    """What the file system says of a file. Who writes it changes at least one of these."""

    inode: int
    size: int
    modified: int
    changed: int  # Cannot be set by hand: it shows writers that put the modification time back, as rsync does.


Files = dict[str, Status]
"""What lies in one place, by name."""


@dataclass(slots=True)
class _Seen:
    """How the files of one place were when they were last looked at, and since when. ``judged``: and what they are."""

    files: Files
    since: float
    judged: bool = False


class Versions:
    """What ``follow`` gives: an iterator of ``Version``. One thread iterates; any thread may ``close``."""

    def __init__(
        self,
        directory: Path,
        interval: float,
        timeout: float | None,
        latest: bool,
        marker: str | None,
        pattern: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._marker, self._pattern = marker, pattern
        self._directory: Any = directory
        self._run = Run.of(directory)
        self._interval, self._timeout, self._latest = interval, timeout, latest
        self._clock = clock
        self._closed = threading.Event()
        self._seen: dict[Any, _Seen] = {}
        self._given: dict[Any, set[tuple[Status, ...]]] = {}
        self._published: set[str] = set()  # folders that were given because a sender had published them
        self._newest = 0  # when the newest version that was given was written
        self._ready: deque[Version] = deque()
        self._absent = ""  # why it cannot be listed
        self._aliases: dict[str, str] = {}
        self._passed_over: dict[Path, str] = {}
        self._unmatched = ""

    @property
    def passed_over(self) -> dict[str, str]:
        """What lies there and is not given: by name, and why. For a health endpoint, say.

        It is broken; or waits for its marker; or has no safetensors, or has them a level deeper. A version is among
        them until it changes or is gone. Where no name matches ``pattern``, or the directory was removed, the directory
        itself is there, and says so.
        """
        passed_over = dict(self._passed_over)  # Whoever asks is in another thread, often.
        for place, seen in list(self._seen.items()):
            if not seen.judged and (why := self._waits(place, seen.files)):
                passed_over[place] = why
        whole = {self._name(): why} if (why := self._absent or self._unmatched) else {}
        return {**whole, **self._aliases, **{place.name: why for place, why in sorted(passed_over.items())}}

    def _match(self, names: Iterable[str], others: Callable[[str], bool] = bool) -> list[str]:
        """The names that match the pattern. Where none does, those of the ``others`` that are versions are noted."""
        names = list(names)
        matching = [name for name in names if fnmatch.fnmatch(name, self._pattern)]
        versions = [] if matching or self._pattern == "*" else [name for name in names if others(name)]
        many = f"{len(versions)} directories do" if len(versions) > 1 else "1 directory does"
        before, self._unmatched = self._unmatched, ""
        if versions:
            self._unmatched = f"{many} not match pattern={self._pattern!r}, and none does: {some(versions, 3)}"
            if not before:
                log(logging.WARNING, "%s: %s", self._directory, self._unmatched)
        return matching

    def _waits(self, place: Any, files: Files) -> str | None:
        """Why nothing is known of this place yet, where that may stay so for ever."""
        if _holds_weights(files):
            lacks = self._marker is not None and self._marker not in files
            return f"waits for {self._marker}, the marker that its writer writes last" if lacks else None
        if files and (unfinished := unfinished_dcp([*files])):
            return unfinished
        return _elsewhere(place, deeper=place != self._directory) if isinstance(place, Path) else None

    def look(self) -> list[Version]:
        """Look once, without waiting: the versions that are ready since the last look, by the time of their writing."""
        if (pointer := self._pointer()) is not None:
            return self._newly(pointer.versions)
        now = self._clock()
        places = self._places()
        for gone in self._passed_over.keys() - places:
            del self._passed_over[gone]
        found = [ready for place in places if (ready := self._settled(place, now)) is not None]
        found.sort(key=lambda ready: (ready[0], _natural(ready[1].name)))
        if self._latest:
            found = [ready for ready in found[-1:] if ready[0] >= self._newest]
            self._newest = max([self._newest, *(written for written, _ in found)])
        return [version for _, version in found]

    def _pointer(self) -> Pointer | None:
        """What a sender has published here. A file of the same name that is another's is nobody's business."""
        try:
            return self._run.read()[0]
        except CheckpointError:
            return None

    def _newly(self, versions: tuple[Published, ...]) -> list[Version]:
        new = [each for each in versions if each.folder not in self._published]
        self._published.update(each.folder for each in versions)
        matching = {*self._match(str(each.version) for each in versions)}
        new = [each for each in new if str(each.version) in matching]
        return [Version(str(each.version), self._path(each.folder)) for each in new[-1 if self._latest else 0 :]]

    def _path(self, folder: str) -> Path | str:
        path: Path = self._directory / folder
        return path

    def close(self) -> None:
        """End the iteration, also one that waits in another thread. May be called twice."""
        self._closed.set()

    def __iter__(self) -> Versions:
        return self

    def __next__(self) -> Version:
        began = self._clock()
        while not self._closed.is_set():
            self._ready.extend(self.look())
            if self._ready:
                return self._ready.popleft()
            left = self._interval if self._timeout is None else began + self._timeout - self._clock()
            if left <= 0:
                break
            self._closed.wait(min(self._interval, left))
        raise StopIteration

    def __enter__(self) -> Versions:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Versions in {str(self._directory)!r}{' closed' if self._closed.is_set() else ''}>"

    def _places(self) -> list[Path]:
        """Where versions may lie: the directory, and those within it. None, and a warning, if it cannot be listed."""
        try:
            names = sorted(os.listdir(self._directory))
        except OSError as error:
            if not self._absent:
                log(logging.WARNING, "%s cannot be listed; waiting for it: %s", self._directory, error.strerror)
            self._absent = f"it cannot be listed; waiting for it: {error.strerror}"
            self._aliases, self._unmatched = {}, ""
            return []
        self._absent = ""
        matching = self._match(
            (name for name in names if name[0] != "."),
            lambda name: _holds_weights(self._files(self._directory / name)),
        )
        within = [place for name in matching if os.path.isdir(place := self._directory / name)]
        aliases = {place: place.resolve().name for place in within if self._is_alias(place)}
        self._aliases = {
            place.name: f"is a link to {other}, beside it, which does not match pattern={self._pattern!r}; versions "
            'are given by their own names: pattern="*"'
            for place, other in aliases.items()
            if not fnmatch.fnmatch(other, self._pattern)
        }
        own = [self._directory] if self._pattern == "*" else []
        return [*own, *(place for place in within if place not in aliases)]

    def _is_alias(self, place: Path) -> bool:
        """A link such as ``latest`` to a version beside it, which would be given twice."""
        return place.is_symlink() and place.resolve().parent == self._directory.resolve()

    def _settled(self, place: Any, now: float) -> tuple[int, Version] | None:
        """The version in this place, if it is ready and was not given, and when it was written."""
        files = self._files(place)
        seen = self._seen.get(place)
        if seen is None or seen.files != files:
            self._seen[place] = seen = _Seen(files, now)
            self._passed_over.pop(place, None)
        if seen.judged or now - seen.since < self._interval or not _holds_weights(files):
            return None
        if self._marker is not None and self._marker not in files:
            return None
        seen.judged = True
        try:
            weights = self._weights(place)
            self._check_order(place, files, weights)
        except HotweightsError as error:
            self._passed_over[place] = why = _why(error)
            log(logging.WARNING, "%s is passed over until it changes: %s", place, why)
            return None
        if self._files(place) != files:  # While its headers were read.
            del self._seen[place]
            return None
        return self._unless_given(place, weights)

    def _unless_given(self, place: Any, weights: Files) -> tuple[int, Version] | None:
        # Without the change time: a hard link to a file, or another mode, makes no other version of it.
        content = tuple(status._replace(changed=0) for _, status in sorted(weights.items()))
        given = self._given.setdefault(place, set())
        if content in given:
            return None
        given.add(content)
        written = max(status.modified for status in weights.values())
        if place == self._directory:
            return written, Version(f"{self._name()}@{_moment(written)}", self._path(""), written / 1e9)
        return written, Version(place.name, self._path(place.name), written / 1e9)

    def _name(self) -> str:
        """What the directory itself is called."""
        return str(self._directory.resolve().name)

    def _check_order(self, place: Path, files: Files, weights: Files) -> None:
        """Raise ``CheckpointError`` if a file of weights is newer than what is written last."""
        if self._marker is not None:
            last = [self._marker]
        else:  # Beside a whole file its index says nothing.
            last = [name for name in files if name.endswith(INDEX) and name.removesuffix(".index.json") not in weights]
            last = [DCP_NAME] if DCP_NAME in weights else last
        # Hubs' clients bring the files in any order, and rename each into its place when it is whole.
        if (
            not last
            or not weights
            or os.path.isdir(place / ".cache" / "huggingface")
            or os.path.islink(place / last[0])
        ):
            return
        ended = max(files[name].modified for name in last)
        if newer := sorted(name for name, status in weights.items() if status.modified > ended):
            raise CheckpointError(
                f"{some(newer, 3)}: newer than {last[0]}, which is written last. Perhaps another version is being "
                f"written. If it is whole: touch {place / last[0]}",
                cause="unfinished",
            )

    def _files(self, place: Path) -> Files:
        """The files of weights in this place, their indexes and the marker."""
        files: Files = {}
        try:
            names = os.listdir(place)
        except OSError:
            return files  # It was removed.
        for name in names:
            if name.endswith((WEIGHTS, INDEX, DCP_BYTES)) or name in (DCP_NAME, self._marker):
                try:
                    status = os.stat(place / name)
                except OSError:
                    continue  # It was removed, or is a link that leads nowhere yet.
                if stat.S_ISREG(status.st_mode):
                    files[name] = _status(status)
        return files

    def _weights(self, place: Any) -> Files:
        """The files of weights of the version in this place. Raises ``CheckpointError`` if one is absent, or broken."""
        saved = dcp_place(place, None)
        if saved is not None and saved.parts and self._marker is None:
            raise CheckpointError(
                f"{place}: each rank wrote its parts of the tensors, and nothing says when all have done so; write a "
                'file when dcp.save has returned, and name it: hotweights.follow(..., marker="DONE")'
            )
        paths = list_checkpoint(place).files if saved is None else _dcp_files(saved)
        try:
            return {os.path.relpath(path, place): _status(os.stat(path)) for path in paths}
        except OSError as error:
            raise CheckpointError(f"{place}: a file went away: {error.strerror}", cause="changed") from error


_NOT_YET = ("missing_shard", "truncated", "empty", "zeros", "unfinished")  # causes that go away while it is written


def _why(error: HotweightsError) -> str:
    """Why a version is passed over. What its writer may still mend is not called broken."""
    if isinstance(error, CheckpointError) and error.cause in _NOT_YET:
        return f"it is not whole, or is being written still: {str(error).removeprefix('the checkpoint is broken: ')}"
    return str(error)


def _holds_weights(files: Files) -> bool:
    return DCP_NAME in files or any(name.endswith(WEIGHTS) for name in files)


def _dcp_files(place: DcpPlace) -> Sequence[str]:
    from .dcp.source import DcpSource  # It needs torch, and a directory of safetensors does not.

    with DcpSource(place) as source:
        return source.files


def _elsewhere(place: Path, *, deeper: bool) -> str | None:
    """What a folder without safetensors holds instead: files of torch, or, ``deeper``, folders of safetensors."""
    try:
        names = sorted(os.listdir(place))
        if torch_files := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
            return f"has no safetensors, which is what is followed, but {some(torch_files, 1)}"
        folders = [name for name in names if name[0] != "." and os.path.isdir(place / name)] if deeper else []
        held = [name for name in folders if any(file.endswith(WEIGHTS) for file in os.listdir(place / name))]
    except OSError:
        return None  # It was removed.
    return f"has its weights a level deeper, in {some(held, 3)}; follow that folder: {place}" if held else None


def _status(status: os.stat_result) -> Status:
    return Status(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts ``step-9`` before ``step-10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _moment(nanoseconds: int) -> str:
    """A time for a name that is the same for all who follow the directory: ``20261126T125148.012345678Z``."""
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y%m%dT%H%M%S}.{rest:09}Z"
