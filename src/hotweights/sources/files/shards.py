"""Which files make up a checkpoint: one file, a directory, an index, a hub cache. Finds, opens and checks them."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ...errors import CheckpointError
from ...text import some
from .file import File
from .header import MAX_HEADER_NBYTES, FileHeader, read_header

_SHOWN = 5  # absent files that are named


class Layout(NamedTuple):
    """How one format lies on disk.

    Attributes:
        main: the checkpoint's usual name, without suffix; of several indexes, the one with this name is taken.
        prefix: how the names of its files begin.
        suffix: how the names of its files end.
        parse: reads what a file holds; raises ``CheckpointError``.
    """

    main: str
    prefix: str
    suffix: str
    parse: Callable[[File], FileHeader]


def _parse_safetensors(file: File) -> FileHeader:
    return read_header(file.path, file.size, file.pread)


SAFETENSORS = Layout("model", "", ".safetensors", _parse_safetensors)


class Shard:
    """One open file of a checkpoint and its header. The owner closes it."""

    __slots__ = ("file", "header")

    def __init__(self, path: str, layout: Layout = SAFETENSORS) -> None:
        self.file = File(path)
        try:
            self.header: FileHeader = layout.parse(self.file)
        except BaseException:
            self.file.close()
            raise

    def close(self) -> None:
        """Close the file. May be called twice."""
        self.file.close()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The open files of one checkpoint. The owner closes them.

    Attributes:
        shards: its files and their headers.
        index: the index that named them; ``None`` if none did.
        warnings: what a person should read: signs that its files are of two versions.
    """

    shards: tuple[Shard, ...]
    index: File | None = None
    warnings: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise ``CheckpointChanged`` if a path no longer leads to the file that was opened, unchanged."""
        for file in self._files():
            file.check()

    def close(self) -> None:
        """Close the files. May be called twice."""
        for file in self._files():
            file.close()

    def _files(self) -> Iterator[File]:
        if self.index is not None:
            yield self.index
        for shard in self.shards:
            yield shard.file


def open_checkpoint(path: str | os.PathLike[str], layout: Layout = SAFETENSORS) -> Checkpoint:
    """Find, open and validate every file of the checkpoint at ``path``. The caller closes it.

    Raises:
        CheckpointError: with every problem of every file and of the index; nothing stays open.
    """
    place = Path(path).expanduser()
    if not os.path.exists(place):  # Unlike Path.exists, false for names that are too long.
        broken = " (a link that leads nowhere)" if os.path.islink(place) else ""
        raise CheckpointError(f"{place}: there is no such file or directory{broken}")
    if place.is_dir():
        return _open_directory(_snapshot(place), layout)
    if place.name.endswith(".json"):
        return _open_index(place, layout)
    return _open_all([place], layout)


def _open_directory(directory: Path, layout: Layout) -> Checkpoint:
    try:
        names = sorted(os.listdir(directory))  # Path.glob would compile an expression first, for milliseconds.
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be listed: {error.strerror}") from error
    mine = [name for name in names if name.startswith(layout.prefix)]
    files = [directory / name for name in mine if name.endswith(layout.suffix)]
    indexes = [directory / name for name in mine if name.endswith(f"{layout.suffix}.index.json")]
    main = directory / f"{layout.main}{layout.suffix}.index.json"
    if main in indexes:
        indexes = [main]
    if len(indexes) > 1:
        listed = ", ".join(index.name for index in indexes)
        raise CheckpointError(f"{directory}: several indexes, {listed}; open the one you mean")
    if indexes:
        whole = directory / indexes[0].name.removesuffix(".index.json")
        if whole in files:
            raise CheckpointError(f"{directory}: holds both {whole.name} and {indexes[0].name}; open the one you mean")
        return _open_index(indexes[0], layout)
    if not files:
        content = f"it holds {some(names, 5)}" if names else "it is empty"
        if layout.suffix != ".bin" and any(name.endswith(".bin") for name in names):
            content += '; reader="torch" opens .bin files'
        raise CheckpointError(f"{directory}: no {layout.prefix}*{layout.suffix} in this directory; {content}")
    return _open_all(files, layout, _absent(files))


def _snapshot(directory: Path) -> Path:
    """The snapshot that a hub cache's ``models--org--name`` directory leads to; any other directory as it is."""
    snapshots = directory / "snapshots"
    if not (directory.name.startswith("models--") and snapshots.is_dir()):
        return directory
    main = directory / "refs" / "main"
    if main.is_file():
        snapshot = snapshots / main.read_text(errors="replace").strip()
        if not snapshot.is_dir():
            raise CheckpointError(f"{directory}: refs/main names the snapshot {snapshot.name!r}, which is not there")
        return snapshot
    revisions = sorted(snapshots.iterdir())
    if len(revisions) == 1:
        return revisions[0]
    raise CheckpointError(f"{directory}: {len(revisions)} snapshots and no refs/main; open the one you mean")


_NUMBERED = re.compile(r"(?P<head>.+-)(?P<number>\d+)-of-(?P<total>\d+)(?P<tail>\..+)")


def _absent(files: Iterable[Path]) -> list[str]:
    """The files that are missing, by the names of those that are there: ``model-00001-of-00003.safetensors``."""
    sets: dict[tuple[str, str, str], dict[int, Path]] = defaultdict(dict)
    for file in files:
        if match := _NUMBERED.fullmatch(file.name):
            sets[match["head"], match["total"], match["tail"]][int(match["number"])] = file
    problems: list[str] = []
    for (head, total, tail), there in sets.items():
        first, part = 0 if 0 in there else 1, there[min(there)]
        # By how many lack: a total of a billion must not be counted through.
        lacking = int(total) - len(there)
        if lacking > 0:
            numbers = islice((number for number in count(first) if number not in there), min(lacking, _SHOWN))
            names = [f"{head}{number:0{len(total)}}-of-{total}{tail}" for number in numbers]
            more = f" and {lacking - len(names)} more" if lacking > len(names) else ""
            problems.append(
                f"{part.parent}: {lacking} of {int(total)} files are absent, {', '.join(names)}{more}; was it copied "
                f"or saved to its end? To read a part of it, open {part}"
            )
    return problems


def _open_all(paths: Iterable[Path], layout: Layout, problems: Iterable[str] = ()) -> Checkpoint:
    with ExitStack() as undo:
        shards, broken = _open_each(paths, layout, undo)
        if problems := [*problems, *broken]:
            raise CheckpointError("the checkpoint is broken", problems)
        undo.pop_all()
    return Checkpoint(shards)


def _open_each(paths: Iterable[Path], layout: Layout, undo: ExitStack) -> tuple[tuple[Shard, ...], list[str]]:
    """The files that can be opened, and what is wrong with the others and between them. ``undo`` closes them."""
    shards: list[Shard] = []
    problems: list[str] = []
    for path in paths:
        try:
            shards.append(Shard(str(path), layout))
            undo.callback(shards[-1].close)
        except CheckpointError as error:
            problems += [f"{error.title}: {problem}" for problem in error.problems] or [error.title]
    return tuple(shards), problems + _duplicates(shards)


def _duplicates(shards: Sequence[Shard]) -> list[str]:
    """One tensor in two files. Other readers take the last one silently."""
    if len(shards) < 2:  # Within one file the header was checked for it.
        return []
    first: dict[str, str] = {}
    problems: list[str] = []
    for shard in shards:
        for entry in shard.header.entries:
            other = first.setdefault(entry.spec.name, shard.file.path)
            if other != shard.file.path:
                problems.append(f"tensor {entry.spec.name!r}: in {other} and again in {shard.file.path}")
    return problems


def _open_index(index: Path, layout: Layout) -> Checkpoint:
    with ExitStack() as undo:
        # It stays open: at the end of reading it must still be the index that named the files.
        file = File(str(index))
        undo.callback(file.close)
        shards = _open_indexed(index, file, layout, undo)
        undo.pop_all()
    return Checkpoint(shards, file, _newer(file, shards))


def _newer(index: File, shards: Iterable[Shard]) -> tuple[str, ...]:
    """A warning if files were written after their index, which savers write last."""
    directory = Path(index.path).parent
    # A hub download comes in any order; each of its files is checked by digest and renamed into place.
    if os.path.islink(index.path) or (directory / ".cache" / "huggingface").is_dir():
        return ()
    newer = [Path(shard.file.path).name for shard in shards if shard.file.modified > index.modified]
    if not newer:
        return ()
    return (
        f"{some(newer, 3)}: newer than {index.path}, which is written last. Perhaps somebody is saving another version "
        f"now, and the files are of two; load it again when that is done. If they were copied so: touch {index.path}",
    )


def _open_indexed(index: Path, file: File, layout: Layout, undo: ExitStack) -> tuple[Shard, ...]:
    weight_map, problems = _read_index(file)
    names = sorted(set(weight_map.values()) - {""})
    problems += [f"{index.name}: shard {name!r} lies outside the directory" for name in names if _outside(name)]
    # Each file once: "a" and "./a" are one.
    paths = list(dict.fromkeys(index.parent / name for name in names if not _outside(name)))
    absent = {path for path in paths if not os.path.exists(path)}
    for path in absent:
        tensors = sum(1 for shard in weight_map.values() if index.parent / shard == path)
        problems.append(f"{path}: named by the index for {tensors} tensors, but there is no such file")
    shards, broken = _open_each([path for path in paths if path not in absent], layout, undo)
    problems += broken + _disagreements(index, weight_map, shards)
    if problems:
        raise CheckpointError(str(index), problems)
    return shards


def _read_index(file: File) -> tuple[dict[str, str], list[str]]:
    """The file of each tensor, ``""`` where the index gives no name; and what is wrong with the index itself."""
    index = file.path
    if file.size > MAX_HEADER_NBYTES:
        raise CheckpointError(f"{index}: an index of {file.size} bytes; at most {MAX_HEADER_NBYTES} are allowed")
    raw = file.pread(file.size, 0)
    problems: set[str] = set()

    def without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        table = dict(pairs)
        if len(table) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            problems.update(f"the name {name!r} occurs twice" for name, times in counts.items() if times > 1)
        return table

    try:
        content = json.loads(raw, object_pairs_hook=without_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a JSON object: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index}: no "weight_map" that names the file of each tensor')
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard:
            problems.add(f"tensor {name!r}: its file is {shard!r}, which is no name")
            weight_map[name] = ""
    return weight_map, sorted(problems)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _outside(name: str) -> bool:
    # The text decides, not where links lead: the files of a hub cache are links that leave the directory.
    return PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name


def _disagreements(index: Path, weight_map: dict[str, str], shards: Iterable[Shard]) -> list[str]:
    """Every tensor that does not lie where the index says. Files that are absent were reported already."""
    problems: list[str] = []
    opened = {shard.file.path for shard in shards}
    homes: dict[str, list[str]] = {}
    for shard in shards:
        for entry in shard.header.entries:
            homes.setdefault(entry.spec.name, []).append(shard.file.path)
    for name, shard_name in weight_map.items():
        if not shard_name:
            continue
        promised = str(index.parent / shard_name)
        actual = homes.get(name, [])
        if not actual and promised in opened:
            problems.append(f"tensor {name!r}: the index says {shard_name}, which does not hold it")
        elif actual and promised not in actual:
            problems.append(
                f"tensor {name!r}: the index says {shard_name}; it lies in {os.path.relpath(actual[0], index.parent)}"
            )
    problems += [
        f"tensor {name!r}: lies in {os.path.relpath(paths[0], index.parent)}; the index does not know it"
        for name, paths in homes.items()
        if name not in weight_map
    ]
    return problems
