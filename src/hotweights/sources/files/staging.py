"""Staging: a folder beside the target in which files are written, until they take its place. It knows no tensors."""

from __future__ import annotations

import contextlib
import filecmp
import itertools
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from ...errors import CheckpointError, SaveError, UsageError
from .directory import named_by_config
from .layout import SAFETENSORS
from .place import Place, text_of
from .writer import sync, write_text

WHOLE = "model.safetensors"
INDEX = f"{WHOLE}.index.json"
Beside: TypeAlias = "Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]]"
"""Files that are to lie beside weights; a mapping says by what names, which may be in folders."""
_OURS = re.compile(r"model(-v\d+)?-\d{5}-of-\d{5}\.safetensors")


class Draft:
    """A checkpoint that is written in a folder of its own, and published from there. ``Staging`` and uploads are such.

    Attributes:
        folder: where the files are to be written, under the names that ``names`` gave.
        is_file: whether the target is one file.
        warnings: what failed after the new version was in its place.
    """

    def __init__(self, where: Place, folder: Path, *, is_file: bool) -> None:
        self.folder = folder
        self.is_file = is_file
        self.warnings: list[str] = []
        self._target = where
        self._published = False
        self._moved: list[str] = []  # what lies in the target and would be nobody's if it is not published
        self._beside: list[str] = []

    def names(self, count: int) -> tuple[list[str], str | None]:
        """Names for ``count`` files of weights, and for their index if they need one."""
        if self.is_file:
            return [self._target.name], None
        # Where an index lies, a file without one would be the second answer to what is meant.
        if count == 1 and not self._exists(INDEX):
            return [WHOLE], None
        # Replacing a shard would show readers of the old index a mix of both versions.
        number = next(n for n in itertools.count(1) if not any(map(self._exists, shard_names(count, n))))
        return shard_names(count, number), INDEX

    def settle(self, names: Sequence[str]) -> list[str]:
        """The names that the written files are published under, of those that ``names`` gave."""
        return list(names)

    def take(self, files: Beside, weights: Sequence[str]) -> None:
        """Copy files that are to lie beside the weights, whose names are ``weights``."""
        named = files if isinstance(files, Mapping) else {Path(file).name: file for file in files}
        for name, file in named.items():
            if (problem := self._unfit(name, weights)) is not None:
                raise UsageError(f"beside={str(file if name == Path(file).name else name)!r}: {problem}")
        folders: set[Path] = set()
        for name, file in named.items():
            copy = self.folder / name
            try:
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
                sync(copy)
            except OSError as error:
                raise SaveError(
                    f"{file}: cannot be copied, and nothing was saved: {error.strerror or error}"
                ) from error
            if "/" in name:
                self._keep(name)
                folders.update(self.folder / folder for folder in Path(name).parents[:-1])
            self._beside.append(name)
        for folder in folders:
            sync(folder)
        if not self.is_file:
            self._check_config(weights)

    def _unfit(self, name: str, weights: Sequence[str]) -> str | None:
        """Why no file may lie beside the weights by this name."""
        if self.is_file:
            return "one file has nothing beside it"
        if name in weights or name == INDEX:
            return "the weights take this name"
        if name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
            return "is no name in the directory, such as config.json or 1_Pooling/config.json"
        return None

    def _keep(self, name: str) -> None:
        """See that no other file of the target is replaced by the one of this name in ``folder``."""

    def _check_config(self, weights: Sequence[str]) -> None:
        """See that no ``config.json`` leads readers of the directory past the new weights."""
        config = (self.folder if "config.json" in self._beside else self._target) / "config.json"
        name = named_by_config(config, SAFETENSORS)
        if name is not None and name not in (*weights, INDEX):
            raise UsageError(
                f'{self._target}: config.json says by "transformers_weights" that the weights are in {name!r}, so '
                "nobody would read what is saved here; save to another directory, to a file, or take that out of "
                "config.json"
            )

    def write_index(self, name: str, weight_map: dict[str, str], nbytes: int) -> None:
        """Write the index."""
        content = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(self.folder / name, json.dumps(content, indent=2) + "\n")

    def _exists(self, name: str) -> bool:
        """Whether the target holds this name already."""
        raise NotImplementedError


class Staging(Draft):
    """Where one checkpoint for a disk is written. As a context manager it removes what was not published.

    * A file takes the target's name by one rename.
    * A directory that does not exist yet comes with all of its files, by one rename.
    * In a directory that exists, new shards get names that no file has, and the index is renamed last.
    """

    def __init__(self, where: Path) -> None:
        self._where = where
        is_file = where.name.endswith(".safetensors") and not where.is_dir()
        if not is_file and os.path.exists(where) and not where.is_dir():
            raise UsageError(f"{where}: is a file. Save to a directory, or to a name that ends in .safetensors")
        self._old: set[str] = set()  # the weights that the new ones replace
        self._into = not is_file and where.is_dir()
        base = where if self._into else where.parent
        os.makedirs(base, exist_ok=True)
        folder = base / f".{where.name}.{secrets.token_hex(4)}.saving"
        os.mkdir(folder)
        super().__init__(where, folder, is_file=is_file)

    def publish(self, names: Sequence[str], index: str | None) -> None:
        """Let the files take the target's place. After that nothing raises: ``warnings`` says what failed."""
        sync(self.folder)
        if self.is_file:
            os.rename(self.folder / names[0], self._where)
        elif not self._into:
            os.rename(self.folder, self._where)
        else:
            self._move_in(names, index)
        self._published = True
        self._afterwards(self._where if self._into else self._where.parent, sync)
        for name in self._beside if self._into else ():
            self._afterwards(self._where / name, self._put_beside)
        for name in self._old:
            self._afterwards(self._where / name, os.unlink)

    def _move_in(self, names: Sequence[str], index: str | None) -> None:
        self._old = replaced_by(self._where, os.listdir(self._where)) - {*names}
        for name in names:
            os.rename(self.folder / name, self._where / name)
            self._moved += [name] if name != WHOLE else []
        if index is None:
            return
        sync(self._where)  # The shards' names go to the disk before the index that names them.
        if not os.path.exists(self._where / index):
            self._moved.append(index)
        os.rename(self.folder / index, self._where / index)
        if WHOLE in self._old:
            os.unlink(self._where / WHOLE)  # Readers take it before an index: until now they see the old version.
            self._old.discard(WHOLE)

    def _put_beside(self, path: Path) -> None:
        name = path.relative_to(self._where)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.rename(self.folder / name, path)

    def _afterwards(self, path: Path, do: Callable[[Path], None]) -> None:
        try:
            do(path)
        except FileNotFoundError:
            pass  # Somebody else removed it.
        except OSError as error:
            self.warnings.append(f"{path}: the new version is complete, but then this failed: {error.strerror}")

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in self._moved if not self._published else ():
            with contextlib.suppress(OSError):
                os.unlink(self._where / name)

    def _keep(self, name: str) -> None:
        if not self._into:
            return
        for folder in map(self._where.__truediv__, Path(name).parents[:-1]):
            if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
                raise SaveError(f"{folder}: is a link or a file, not a folder, and nothing was saved; remove it")
        there = self._where / name
        if not os.path.lexists(there):
            return
        if there.is_symlink() or not there.is_file() or not filecmp.cmp(self.folder / name, there, shallow=False):
            raise SaveError(
                f"{there}: is there with other content, and nothing was saved; remove it, or save to another directory"
            )

    def _exists(self, name: str) -> bool:
        return self._into and os.path.lexists(self._where / name)


def shard_names(count: int, number: int) -> list[str]:
    """The names of so many shards. A higher number is for those who find these taken."""
    stem = "model" if number == 1 else f"model-v{number}"
    return [f"{stem}-{shard + 1:05}-of-{count:05}.safetensors" for shard in range(count)]


def replaced_by(directory: Place, there: Iterable[str]) -> set[str]:
    """The files of weights that a checkpoint of ours replaces: those by our names, and those that its index names."""
    names = {name for name in there if name == WHOLE or _OURS.fullmatch(name)}
    with contextlib.suppress(OSError, CheckpointError, ValueError, AttributeError):
        named = json.loads(text_of(directory / INDEX)).get("weight_map", {}).values()
        names |= {name for name in named if isinstance(name, str) and name == os.path.basename(name)}
    return names
