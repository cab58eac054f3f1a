"""Shards: the open files of one checkpoint. Opens and checks what a path, a list, an index or a directory leads to."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import count, islice
from pathlib import Path

from ...errors import CheckpointError, Problem, StoreError, UsageError
from ...text import some
from ..checksums import Digests, Proof
from .directory import find, folder_in, snapshot, unfinished
from .file import File, leads_nowhere
from .header import FileHeader
from .index import disagreements, files_named_by, lies_outside, read_index
from .layout import SAFETENSORS, Layout
from .place import Place, Readable, Remote, exists, is_dir, is_named_file, names_in, open_place, open_soon

_SHOWN = 5  # absent files that are named


class ShardFile:
    """One open file of a checkpoint and its header. The owner closes it."""

    __slots__ = ("file", "header")

    def __init__(self, place: Place, layout: Layout = SAFETENSORS) -> None:
        self.file = open_place(place)
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
        warnings: what a person should read: signs that its files are of two versions, or that others are meant.
        several: names of tensors that also lie in files other than the one that the index names.
        proof: that the files hold what a list of digests says, where there is one.
    """

    shards: tuple[ShardFile, ...]
    index: Readable | None = None
    warnings: tuple[str, ...] = ()
    several: tuple[str, ...] = ()
    proof: Proof | None = None

    def proven(self, path: str, checksums: str | os.PathLike[str] | None, digests: Digests | None) -> Checkpoint:
        """This one, which is compared with a list of digests while it is read; all is closed if there is no such list.

        Args:
            path: what the checkpoint is called.
            checksums: the file with the list; ``None`` for no list.
            digests: makes digests of the tensors; ``None`` where nobody here can.

        Raises:
            CheckpointError: the list cannot be read, or lacks a file or a tensor.
        """
        if checksums is None:
            return self
        try:
            files = {shard.file.path: None if isinstance(shard.file, File) else shard.file for shard in self.shards}
            names = [entry.spec.name for shard in self.shards for entry in shard.header.entries]
            return replace(self, proof=Proof(path, files, names, Path(checksums), digests))
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        """Called when reading begins."""
        if self.proof is not None:
            self.proof.begin()

    def check(self) -> None:
        """See that all files hold what they should. Called when all is read, before it counts.

        Raises:
            CheckpointChanged: a path no longer leads to the file that was opened, unchanged.
            CheckpointError: they are not what the list of digests says.
        """
        if self.proof is not None:
            self.proof.check()
        for file in self._files():
            file.check()

    def close(self) -> None:
        """Close the files. May be called twice."""
        if self.proof is not None:
            self.proof.close()
        for file in self._files():
            file.close()

    def _files(self) -> Iterator[Readable]:
        if self.index is not None:
            yield self.index
        for shard in self.shards:
            yield shard.file


Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""One path, or a list of files."""


def path_of(what: Paths) -> str:
    """The path, in words where there are several."""
    if isinstance(what, (str, os.PathLike)):
        return os.fspath(what)
    return some([os.fspath(path) for path in what], 1)


def open_checkpoint(
    what: Paths | Remote | Sequence[Remote],
    layout: Layout = SAFETENSORS,
    *,
    variant: str | None = None,
    subfolder: str | None = None,
) -> Checkpoint:
    """Find, open and validate every file of the checkpoint. The caller closes it.

    Args:
        what: a file, an index, a directory, the root of a hub cache; or a list of files.
        layout: which files of a directory are meant.
        variant: of several precisions in a directory, which one.
        subfolder: the folder in the directory.

    Raises:
        CheckpointError: with every problem of every file and of the index; nothing stays open.
        UsageError: ``variant`` or ``subfolder`` is given, and ``what`` is no directory.
    """
    place = _place(what) if isinstance(what, (str, os.PathLike)) else None
    if place is not None and not exists(place):
        broken = f" ({leads_nowhere(place)})" if isinstance(place, Path) and os.path.islink(place) else ""
        raise CheckpointError(
            f"{place}: there is no such file or directory{broken or neighbour(place)}", cause="not_found"
        )
    if place is not None and is_dir(place):
        return _open_directory(folder_in(snapshot(place), subfolder, layout), layout, variant)
    if variant is not None or subfolder is not None:
        told = f"{place} is a file" if place is not None else "these are files"
        raise UsageError(f"variant= and subfolder= choose among the files of a directory; {told}; leave them out")
    if place is None:
        paths = [_place(path) for path in what]  # type: ignore[union-attr]
        # Each file once, by whatever path. In a list nothing is absent: whoever made it chose.
        return _open_all(list({_absolute(path): path for path in paths}.values()), layout)
    if place.name.endswith(".json"):
        return _open_index(place, layout)
    return _open_all([place], layout)


def _place(what: str | os.PathLike[str]) -> Place:
    return what if isinstance(what, Remote) else Path(what).expanduser()


def _absolute(place: Place) -> str:
    return str(place) if isinstance(place, Remote) else os.path.abspath(place)


def _open_directory(directory: Place, layout: Layout, variant: str | None) -> Checkpoint:
    choice = find(directory, layout, variant)
    if choice.index is not None:
        return _open_index(directory / choice.index, layout, choice.others)
    files = [directory / name for name in choice.files]
    # mlx writes an index beside the one file that holds all: both names mean one thing.
    mine = set(choice.files)
    others = [name for name in choice.others if name[-5:] != ".json" or files_named_by(directory / name) != mine]
    return _open_all(files, layout, _absent(files), _passed_over(directory, some(choice.files, 1), others))


def _passed_over(directory: Place, opened: str, others: Sequence[str]) -> tuple[str, ...]:
    """A warning for files that look like weights too. They may be what the user meant, or a leftover."""
    if not others:
        return ()
    return (
        f"{directory}: opened {opened}, and passed over {some(others, 3)}; if that is what you mean, open it by its "
        "own path",
    )


_NUMBERED = re.compile(r"(?P<head>.+-)(?P<number>\d+)-of-(?P<total>\d+)(?P<tail>\..+)")


def _absent(files: Sequence[Place]) -> list[str]:
    """The files that are missing, by the names of those that are there: ``model-00001-of-00003.safetensors``."""
    sets: dict[tuple[str, str, str], dict[int, Place]] = defaultdict(dict)
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
            absent = [f"{head}{number:0{len(total)}}-of-{total}{tail}" for number in numbers]
            more = f" and {lacking - len(absent)} more" if lacking > len(absent) else ""
            more += _begun(_beside(part.parent), absent)
            told = (
                f"{part.parent}: {lacking} of {int(total)} files are absent, {', '.join(absent)}{more}; was it copied "
                f"or saved to its end? To read a part of it, open {part}"
            )
            problems.append(Problem(told, "missing_shard"))
    return problems


def _open_all(
    paths: Iterable[Place], layout: Layout, problems: Iterable[str] = (), warnings: tuple[str, ...] = ()
) -> Checkpoint:
    with ExitStack() as undo:
        shards, broken = _open_each(paths, layout, undo)
        if problems := [*problems, *broken, *_duplicates(_homes(shards), ())]:
            # Of files that nobody may open it is not known whether they are broken.
            unknown = all(": cannot be opened: " in problem for problem in problems)
            raise CheckpointError(f"the checkpoint {'cannot be read' if unknown else 'is broken'}", problems)
        undo.pop_all()
    return Checkpoint(shards, warnings=warnings)


def _open_each(paths: Iterable[Place], layout: Layout, undo: ExitStack) -> tuple[tuple[ShardFile, ...], list[str]]:
    """The files that can be opened, and what is wrong with the others. ``undo`` closes them."""
    shards: list[ShardFile] = []
    problems: list[str] = []
    paths = list(paths)
    open_soon(paths)
    for path in paths:
        try:
            if isinstance(path, Path) and os.path.exists(f"{path}.aria2"):  # It has its full length from the beginning.
                raise CheckpointError(
                    f"{path}: aria2 has not downloaded it to its end: {path.name}.aria2 lies there", cause="unfinished"
                )
            shards.append(ShardFile(path, layout))
            undo.callback(shards[-1].close)
        except StoreError:
            raise  # What could not be asked for may be sound.
        except CheckpointError as error:
            told = [f"{error.title}: {problem}" for problem in error.problems] or [error.title]
            problems += [Problem(each, error.cause) for each in told]
    return tuple(shards), problems


def _homes(shards: Sequence[ShardFile]) -> dict[str, list[str]]:
    """The files that hold each tensor."""
    homes: dict[str, list[str]] = {}
    for shard in shards:
        for entry in shard.header.entries:
            homes.setdefault(entry.spec.name, []).append(shard.file.path)
    return homes


def _duplicates(homes: dict[str, list[str]], decided: Container[str]) -> list[str]:
    """One tensor in two files, and nothing decides. Other readers take the last one silently."""
    return [
        Problem(f"tensor {name!r}: in {paths[0]} and again in {path}", "duplicate_tensor")
        for name, paths in homes.items()
        if len(paths) > 1 and name not in decided
        for path in paths[1:]
    ]


def _open_index(index: Place, layout: Layout, others: Sequence[str] = ()) -> Checkpoint:
    with ExitStack() as undo:
        # It stays open: at the end of reading it must still be the index that named the files.
        file = open_place(index)
        undo.callback(file.close)
        weight_map, problems = read_index(file)
        shards, broken = _open_indexed(index, weight_map, layout, undo)
        homes = _homes(shards)
        problems += broken + _duplicates(homes, weight_map)
        problems += disagreements(index.parent, weight_map, homes, [shard.file.path for shard in shards])
        if problems:
            raise CheckpointError(str(index), problems, cause="index_disagrees")
        several = _obey(index.parent, weight_map, shards, homes)
        more = [name for name in homes if name not in weight_map]
        left = sorted(set(others).difference(weight_map.values()))
        warnings = _newer(file, shards) + _passed_over(index.parent, index.name, left) + _beyond(index, more, several)
        undo.pop_all()
    return Checkpoint(shards, file, warnings, tuple(several))


def _obey(
    directory: Place, weight_map: Mapping[str, str], shards: Sequence[ShardFile], homes: Mapping[str, list[str]]
) -> list[str]:
    """Let each tensor that lies in several shards be in the one that the index names; these tensors' names."""
    several = {name for name, paths in homes.items() if len(paths) > 1}
    for shard in shards if several else ():
        mine = [
            entry
            for entry in shard.header.entries
            if entry.spec.name not in several or str(directory / weight_map[entry.spec.name]) == shard.file.path
        ]
        shard.header = shard.header._replace(entries=tuple(mine))
    return sorted(several)


def _beyond(index: Place, more: Sequence[str], several: Sequence[str]) -> tuple[str, ...]:
    """Warnings for what the shards hold besides what the index says."""
    warnings = []
    if more:
        warnings.append(
            f"{index}: does not name {some(more, 3)}, which its files hold; taken, as from_pretrained takes it"
        )
    if several:
        warnings.append(
            f"{index}: {some(several, 3)} lie in several of its files; taken from the file that the index names"
        )
    return tuple(warnings)


def _newer(index: Readable, shards: Iterable[ShardFile]) -> tuple[str, ...]:
    """A warning if files were written after their index, which savers write last. Uploads come in any order."""
    if not isinstance(index, File):
        return ()
    directory = Path(index.path).parent
    # A hub download comes in any order; each of its files is checked by digest and renamed into place.
    if os.path.islink(index.path) or (directory / ".cache" / "huggingface").is_dir():
        return ()
    newer = [
        Path(shard.file.path).name
        for shard in shards
        if isinstance(shard.file, File) and shard.file.modified > index.modified
    ]
    if not newer:
        return ()
    return (
        f"{some(newer, 3)}: newer than {index.path}, which is written last. Perhaps somebody is saving another version "
        f"now, and the files are of two; load it again when that is done. If they were copied so: touch {index.path}",
    )


def _open_indexed(
    index: Place, weight_map: Mapping[str, str], layout: Layout, undo: ExitStack
) -> tuple[tuple[ShardFile, ...], list[str]]:
    names = sorted(set(weight_map.values()) - {""})
    problems = [f"{index.name}: shard {name!r} lies outside the directory" for name in names if lies_outside(name)]
    # Each file once: "a" and "./a" are one.
    paths = list(dict.fromkeys(index.parent / name for name in names if not lies_outside(name)))
    open_soon(paths)
    absent = {path for path in paths if not is_named_file(path)}
    beside = _beside(index.parent) if absent else []
    for path in absent:
        tensors = sum(1 for shard in weight_map.values() if index.parent / shard == path)
        told = (
            f"{path}: named by the index for {tensors} tensors, but "
            + (
                f"it is {leads_nowhere(path)}"
                if isinstance(path, Path) and os.path.islink(path)
                else "there is no such file"
            )
            + _begun(beside if path.parent == index.parent else _beside(path.parent), [path.name])
        )
        problems.append(Problem(told, "missing_shard"))
    shards, broken = _open_each([path for path in paths if path not in absent], layout, undo)
    return shards, problems + broken


def neighbour(place: Place) -> str:
    """Which name beside a path that leads nowhere is nearly its own."""
    try:
        names = names_in(place.parent) if isinstance(place, Path) else []
    except CheckpointError:  # The folder is not there either, or not ours to list.
        return ""
    near = get_close_matches(place.name, names, n=len(names) or 1, cutoff=0.75)
    near = sorted(name for name in near if name.startswith(place.name)) or near
    if (shard := _NUMBERED.fullmatch(place.name)) is not None:
        near = [name for name in near if not _is_another(shard, _NUMBERED.fullmatch(name))]
    return f"; did you mean {place.parent / near[0]}?" if near else ""


def _is_another(shard: re.Match[str], other: re.Match[str] | None) -> bool:
    """Whether the other is another shard of the same weights."""
    parts = ("head", "total", "tail")
    return other is not None and other["number"] != shard["number"] and other.group(*parts) == shard.group(*parts)


def _beside(directory: Place) -> list[str]:
    """What lies there, as far as it can be listed: it only explains an error."""
    try:
        return names_in(directory) if is_dir(directory) else []
    except CheckpointError:
        return []


def _begun(beside: Sequence[str], absent: Iterable[str]) -> str:
    """Whether the download of an absent file has begun."""
    begun = [other for name in absent if (other := unfinished(name, beside)) is not None]
    return f"; its download has not ended: {some(begun, 3)}" if begun else ""
