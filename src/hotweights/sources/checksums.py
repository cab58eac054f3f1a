"""Checksums: a file that says what a checkpoint must hold, and the proof that it does.

Two formats: lines of ``sha256sum``, and the JSON that ``hotweights verify --write`` makes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from .. import signals
from ..errors import CheckpointChanged, CheckpointError, Closed, UsageError

if TYPE_CHECKING:  # It needs torch, and files are listed without that.
    from ..memory.digest import Digest
    from .files.place import Readable

_LINE = re.compile(r"(?P<digest>[0-9a-fA-F]{64}) [ *](?P<name>.+)")
_TAGGED = re.compile(r"SHA256 \((?P<name>.+)\) = (?P<digest>[0-9a-fA-F]{64})")
_PIECE = 1024 * 1024
_OF_STORE = 32 * _PIECE  # some requests at once

Digests: TypeAlias = "Callable[[threading.Event], Digest]"
"""Reads every tensor and gives their digests; ``Closed`` where the event is set meanwhile."""


class Proof:
    """Whether files hold what a list says: found out by threads of its own, while others read the files.

    What is read first comes from the disk, and second from the page cache. Both read through it, so the disk reads each
    byte once as long as the page cache holds what lies between the two.
    """

    def __init__(
        self,
        checkpoint: str,
        files: Mapping[str, Readable | None],
        names: Sequence[str],
        checksums: Path,
        digests: Digests | None,
    ) -> None:
        """Read the list; of the files nothing is read before ``begin``.

        Args:
            checkpoint: what it is called.
            files: paths of its files; and what reads those that are not on a disk.
            names: of its tensors.
            checksums: the file with the list.
            digests: makes the digests of its tensors; ``None`` where nobody can.

        Raises:
            CheckpointError: the list cannot be read, or lacks a file or a tensor.
            UsageError: the list has digests of tensors, and nobody makes them.
        """
        self._title = f"{checkpoint}: is not what {checksums} says"
        text = _text_of(checksums)
        if text.lstrip().startswith("{"):
            if digests is None:
                raise UsageError(
                    f"{checksums} has digests of tensors, which this reader does not compare; leave reader= out, "
                    "or give lines of sha256sum"
                )
            said = _tensors_in(checksums, text)
            problems = [f"tensor {name!r}: expected, and not there" for name in said.keys() - {*names}]
            problems += [f"tensor {name!r}: not in the list" for name in names if name not in said]
            self._work: list[Callable[[], list[str]]] = [partial(self._tensors, said, digests)]
        else:
            found = {file: _said_of(file, checksums, text) for file in files}
            problems = [f"{os.path.basename(file)}: not in the list" for file, said in found.items() if said is None]
            self._work = [partial(self._file, file, files[file], said) for file, said in found.items() if said]
        if problems:
            raise CheckpointError(self._title, problems, cause="digests_differ")
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._crew: ThreadPoolExecutor | None = None  # Made under the lock, by the first ``begin``.
        self._futures: list[Future[list[str]]] = []

    @signals.held
    def begin(self) -> None:
        """Begin to read. Called again, it does nothing."""
        with self._lock:
            if self._crew is None and not self._stopped.is_set():
                threads = min(len(self._work), os.cpu_count() or 1)
                self._crew = ThreadPoolExecutor(max(1, threads), thread_name_prefix="hotweights-digest")
                self._futures = [self._crew.submit(work) for work in self._work]

    def check(self) -> None:
        """Wait until all is read.

        Raises:
            CheckpointError: with every file or tensor that differs, and both digests.
            Closed: it was closed meanwhile.
        """
        self.begin()
        while wait(self._futures, timeout=0.1).not_done:
            signals.deliver()
            if self._stopped.is_set():  # What had not begun by then never will.
                raise Closed("the source was closed while it was compared with digests")
        if problems := [problem for future in self._futures for problem in future.result()]:
            raise CheckpointError(self._title, problems, cause="digests_differ")

    @signals.held
    def close(self) -> None:
        """Stop reading. May be called twice."""
        self._stopped.set()
        with self._lock:
            if self._crew is not None:
                self._crew.shutdown(cancel_futures=True)

    def _tensors(self, said: Mapping[str, str], digests: Digests) -> list[str]:
        found = digests(self._stopped).tensors
        problems = [
            f"tensor {name!r}: digest {said[name]} expected, found {digest}"
            for name, digest in found.items()
            if said[name] != digest
        ]
        if len(problems) > 1 and 10 * len(problems) >= 9 * len(found):  # Of another dtype integers are the same.
            return [
                f"{len(problems)} of {len(found)} tensors differ: another checkpoint, or another dtype, which digests "
                "count; hotweights diff compares two checkpoints"
            ]
        return problems

    def _file(self, path: str, readable: Readable | None, said: str) -> list[str]:
        digest = hashlib.sha256()
        for piece in self._of_disk(os.path.abspath(path)) if readable is None else self._of_store(readable):
            if self._stopped.is_set():
                raise Closed(f"{path} was closed")
            digest.update(piece)
        found = digest.hexdigest()
        return [] if found == said else [f"{os.path.basename(path)}: sha256 {said} expected, found {found}"]

    def _of_disk(self, path: str) -> Iterator[bytes]:
        try:
            with open(path, "rb") as file:
                while piece := file.read(_PIECE):
                    yield piece
        except OSError as error:
            raise CheckpointChanged(f"{path}: cannot be read any more: {error.strerror}") from error

    def _of_store(self, readable: Readable) -> Iterator[bytearray]:
        for start in range(0, readable.size, _OF_STORE):
            piece = bytearray(min(_OF_STORE, readable.size - start))
            readable.read_into([piece], start, self._stopped.is_set)
            yield piece


def _text_of(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}", cause="bad_digests"
        ) from error


def _tensors_in(path: Path, text: str) -> dict[str, str]:
    try:
        expected = json.loads(text)["tensors"]
        return {str(name): str(digest) for name, digest in expected.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f'{path}: no digests: JSON with "tensors" was expected, by hotweights verify --write', cause="bad_digests"
        ) from error


def _said_of(file: str, checksums: Path, text: str) -> str | None:
    """What the list says of a file: by its path from the list's folder, or else by its name."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    matches = [_LINE.fullmatch(line) or _TAGGED.fullmatch(line) for line in lines]
    said = [(match["name"], match["digest"].lower()) for match in matches if match is not None]
    if None in matches or not said:
        raise CheckpointError(
            f"{checksums}: no digests: lines of sha256sum were expected, or JSON by hotweights verify --write",
            cause="bad_digests",
        )
    here = os.path.abspath(file)
    paths = [digest for name, digest in said if os.path.abspath(checksums.parent / name) == here]
    if "://" in file:  # The list lies elsewhere: the longest of its paths that the address ends with.
        ends = [(len(name), digest) for name, digest in said if file.endswith(f"/{os.path.normpath(name)}")]
        paths = [digest for _, digest in sorted(ends)]
    names = {digest for name, digest in said if os.path.basename(name) == os.path.basename(file)}
    if paths:
        return paths[-1]
    if len(names) > 1:
        raise CheckpointError(
            f"{checksums}: says several digests of files that are called {os.path.basename(file)}; put the list into "
            "the folder that its paths begin in",
            cause="bad_digests",
        )
    return next(iter(names), None)


def write_digests(digest: Digest, path: str | os.PathLike[str]) -> None:
    """Write a file that ``digests=`` and ``hotweights verify --digests`` read."""
    try:
        Path(path).write_text(json.dumps(digest.as_dict(), indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{os.fspath(path)}: cannot be written: {error.strerror}", cause="cannot_write"
        ) from error
