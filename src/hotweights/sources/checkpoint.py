"""Which files make up a checkpoint: one file, a directory, an index, a hub cache. Opens them; reads no tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError
from .header import MAX_HEADER_NBYTES, Header, read_header
from .reading import File

__all__ = ["Shard", "open_shards"]

_INDEX_SUFFIX = ".safetensors.index.json"


class Shard:
    """One open file of a checkpoint and its header. The owner closes it."""

    __slots__ = ("file", "header")

    def __init__(self, path: str) -> None:
        self.file = File(path)
        try:
            self.header: Header = read_header(path, self.file.size, self.file.pread)
        except BaseException:
            self.file.close()
            raise

    def close(self) -> None:
        """Close the file. May be called twice."""
        self.file.close()


def open_shards(path: str | os.PathLike[str]) -> tuple[Shard, ...]:
    """Find, open and validate every file of the checkpoint at ``path``. The caller closes them.

    Raises:
        CheckpointError: with every problem of every file and of the index; nothing stays open.
    """
    place = Path(path).expanduser()
    if not place.exists():
        broken = " (a link that leads nowhere)" if place.is_symlink() else ""
        raise CheckpointError(f"{place}: there is no such file or directory{broken}")
    if place.is_dir():
        return _open_directory(_snapshot(place))
    if place.name.endswith(".json"):
        return _open_index(place)
    return _open_all([place])


def _open_directory(directory: Path) -> tuple[Shard, ...]:
    files = sorted(directory.glob("*.safetensors"))
    indexes = sorted(directory.glob(f"*{_INDEX_SUFFIX}"))
    main = directory / f"model{_INDEX_SUFFIX}"
    if main in indexes:
        indexes = [main]
    if len(indexes) > 1:
        raise CheckpointError(f"{directory}: several indexes, {_listed(indexes)}; open the one you mean")
    if indexes:
        whole = directory / indexes[0].name.removesuffix(".index.json")
        if whole in files:
            raise CheckpointError(f"{directory}: holds both {whole.name} and {indexes[0].name}; open the one you mean")
        return _open_index(indexes[0])
    if not files:
        others = sorted(entry.name for entry in directory.iterdir())[:5]
        found = f"it holds {', '.join(others)}" if others else "it is empty"
        raise CheckpointError(f"{directory}: no *.safetensors in this directory; {found}")
    return _open_all(files)


def _snapshot(directory: Path) -> Path:
    """The snapshot that a hub cache's ``models--org--name`` directory leads to; any other directory is itself."""
    snapshots = directory / "snapshots"
    if not (directory.name.startswith("models--") and snapshots.is_dir()):
        return directory
    main = directory / "refs" / "main"
    if main.is_file():
        return snapshots / main.read_text().strip()
    revisions = sorted(snapshots.iterdir())
    if len(revisions) == 1:
        return revisions[0]
    raise CheckpointError(f"{directory}: {len(revisions)} snapshots and no refs/main; open the one you mean")


def _open_all(paths: Iterable[Path]) -> tuple[Shard, ...]:
    shards: list[Shard] = []
    problems: list[str] = []
    for path in paths:
        try:
            shards.append(Shard(str(path)))
        except CheckpointError as error:
            problems += (error.problems and [f"{error.title}: {problem}" for problem in error.problems]) or [
                error.title
            ]
    problems += _duplicates(shards)
    if problems:
        _close(shards)
        raise CheckpointError("the checkpoint is broken", problems)
    return tuple(shards)


def _duplicates(shards: Iterable[Shard]) -> list[str]:
    """One tensor in two files. Every other reader takes the last, silently."""
    first: dict[str, str] = {}
    problems: list[str] = []
    for shard in shards:
        for spec, _ in shard.header.entries:
            other = first.setdefault(spec.name, shard.file.path)
            if other != shard.file.path:
                problems.append(f"tensor {spec.name!r}: in {other} and again in {shard.file.path}")
    return problems


def _open_index(index: Path) -> tuple[Shard, ...]:
    weight_map = _read_index(index)
    names = sorted(set(weight_map.values()))
    problems = [f"{index.name}: shard {name!r} lies outside the directory" for name in names if _outside(name)]
    paths = [index.parent / name for name in names if not _outside(name)]
    absent = {path for path in paths if not path.exists()}
    for path in absent:
        count = sum(1 for shard in weight_map.values() if index.parent / shard == path)
        problems.append(f"{path}: named by the index for {count} tensors, but there is no such file")
    shards: tuple[Shard, ...] = ()
    try:
        shards = _open_all(path for path in paths if path not in absent)
    except CheckpointError as error:
        raise CheckpointError(str(index), [*problems, *(error.problems or [error.title])]) from error
    problems += _disagreements(index, weight_map, shards)
    if problems:
        _close(shards)
        raise CheckpointError(str(index), problems)
    return shards


def _read_index(index: Path) -> dict[str, str]:
    if index.stat().st_size > MAX_HEADER_NBYTES:
        raise CheckpointError(
            f"{index}: an index of {index.stat().st_size} bytes; at most {MAX_HEADER_NBYTES} are allowed"
        )
    problems: set[str] = set()

    def pairs(found: list[tuple[str, object]]) -> dict[str, object]:
        table = dict(found)
        if len(table) != len(found):
            seen: set[str] = set()
            problems.update(f"the name {name!r} occurs twice" for name, _ in found if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        return table

    try:
        content = json.loads(index.read_bytes(), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a JSON object: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index}: no "weight_map" that names the file of each tensor')
    problems.update(
        f"tensor {name!r}: its file is {shard!r}, which is no name"
        for name, shard in weight_map.items()
        if not isinstance(shard, str) or not shard
    )
    if problems:
        raise CheckpointError(str(index), problems)
    return weight_map


def _outside(name: str) -> bool:
    # The text decides, not where links lead: a hub cache's files are links out of the directory, made by its owner.
    return PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name


def _disagreements(index: Path, weight_map: dict[str, str], shards: Iterable[Shard]) -> list[str]:
    """Every tensor that does not lie where the index says. A shard that is absent was reported already."""
    problems: list[str] = []
    opened = {shard.file.path for shard in shards}
    found = {spec.name: shard.file.path for shard in shards for spec, _ in shard.header.entries}
    for name, shard_name in weight_map.items():
        promised = str(index.parent / shard_name)
        actual = found.get(name)
        if actual is None and promised in opened:
            problems.append(f"tensor {name!r}: the index says {shard_name}, which does not hold it")
        elif actual is not None and actual != promised:
            problems.append(
                f"tensor {name!r}: the index says {shard_name}; it lies in {os.path.relpath(actual, index.parent)}"
            )
    problems += [
        f"tensor {name!r}: lies in {os.path.relpath(path, index.parent)}; the index does not know it"
        for name, path in found.items()
        if name not in weight_map
    ]
    return problems


def _close(shards: Iterable[Shard]) -> None:
    for shard in shards:
        shard.close()


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(path.name for path in paths)
