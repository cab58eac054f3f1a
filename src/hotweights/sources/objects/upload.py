"""Upload: a checkpoint that is written to a temporary folder, and from there to a store, the index last."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash

from ...errors import HotweightsError, SaveError
from ..files.place import text_of
from ..files.staging import INDEX, WHOLE, Draft, replaced_by, shard_names
from .address import Address
from .service import Refusal

_JOURNAL = re.compile(r"model(-v\d+)?\.saving\.json")
_PIECE = 8 * 1024 * 1024


class Upload(Draft):
    """Where one checkpoint for a store is written. As a context manager it removes the temporary folder.

    An object appears whole or not at all. In a folder that holds a checkpoint new shards get names that no object has,
    and the index is replaced last, if it still is the one that was found: readers see the old version or the new one.

    Before the first shard a journal says what all of them will hold. Their names are theirs alone from then on: whoever
    saves the same again, after a death or a failure, finds them and goes on; whoever saves something else takes others.
    """

    def __init__(self, where: Address) -> None:
        self._address = where
        is_file = not where.is_dir()
        self._there = set() if is_file else set(where.names())
        self._into = bool(self._there)
        self._found = where.store.head((where / INDEX).key).only_over if INDEX in self._there else {}
        self._old = replaced_by(where, self._there) | {name for name in self._there if _JOURNAL.fullmatch(name)}
        self._journal: str | None = None
        self._said = b""  # in the journal
        super().__init__(where, Path(tempfile.mkdtemp(prefix="hotweights-")), is_file=is_file)

    def __enter__(self) -> Upload:
        return self

    def names(self, count: int) -> tuple[list[str], str | None]:
        """See ``Draft``. Those of shards are the files' only; ``settle`` says what the objects are called."""
        names, index = super().names(count)
        return (names, None) if index is None else (shard_names(count, 1), index)

    def settle(self, names: Sequence[str]) -> list[str]:
        """See ``Draft``. The files of shards are renamed, too."""
        journal = json.dumps([_described(self.folder / name) for name in names]).encode()
        for number in itertools.count(1):
            settled = shard_names(len(names), number)
            self._journal, self._said = f"model{'' if number == 1 else f'-v{number}'}.saving.json", journal
            free = not any(name in self._there for name in settled)
            if (free or self._journal in self._there) and self._claim(self._journal, journal):
                break
        for name, new in reversed(list(zip(names, settled, strict=True))):
            os.rename(self.folder / name, self.folder / new)
        return settled

    def _claim(self, name: str, journal: bytes) -> bool:
        """Whether the names that go with this journal are for what it says."""
        place = self._address / name
        found = self._address.store.content(place.key)
        if found is None:
            refusal = self._address.store.put(place.key, journal, "create")
            if refusal is None:
                return True
            if not refusal.replaced:
                raise SaveError(f"{place}: nothing was saved: the store said: {refusal.answer}")
            found = self._address.store.content(place.key)  # Somebody else's, or that of a first try.
        return found is not None and found[0] == journal

    def publish(self, names: Sequence[str], index: str | None) -> None:
        """Upload the files, the index last. After that nothing raises: ``warnings`` says what failed."""
        last = names[0] if index is None else index
        found = [name for name in names if index is not None and self._is_there(name)]
        for name in [] if index is None else names:
            if name not in found:
                self._put(name)
        if found:
            self._check_found(found)
        if not self._into:  # Nobody opens the folder yet.
            for name in self._beside:
                self._put(name)
        if self.is_file:
            self._put(last, self._address)
        elif index is None:
            self._put(last)
        else:
            self._put(last, mode=self._only_over_what_was_found())
        for name in self._beside if self._into else ():
            self._afterwards(name, self._put_beside)
        old = self._old | ({self._journal} if self._journal else set())
        # First what readers take before an index: until then they see the old version.
        for name in sorted(old - {*names}, key=lambda name: (name != WHOLE, not _JOURNAL.fullmatch(name))):
            self._afterwards(name, lambda name: self._address.store.delete((self._address / name).key))

    def _is_there(self, name: str) -> bool:
        """Whether a save that was cut short has uploaded it: nothing else gets a name that a journal has taken."""
        if name not in self._there:
            return False
        try:
            found = self._address.store.head((self._address / name).key)
        except FileNotFoundError:
            return False
        return found.size == (self.folder / name).stat().st_size

    def _check_found(self, names: Sequence[str]) -> None:
        """Raise ``SaveError`` if another save has published since, and removes what it did not write."""
        assert self._journal is not None, "only shards are found"
        journal = self._address.store.content((self._address / self._journal).key)
        if journal is None or journal[0] != self._said or not all(map(self._is_there, names)):
            raise SaveError(f"{self._address}: nothing was saved: somebody else saved there meanwhile")

    def _only_over_what_was_found(self) -> object:
        if INDEX not in self._there:
            return "create"
        return self._found or "overwrite"

    def _put(self, name: str, to: Address | None = None, *, mode: object = "overwrite") -> None:
        place, file = to or self._address / name, self.folder / name
        refusal = self._address.store.put(place.key, file, mode)
        if refusal is None:
            return
        if refusal.replaced:  # By another save of the same, or by a first try whose answer was lost.
            found = self._address.store.content(place.key)
            if found is not None and found[0] == file.read_bytes():
                return
        said = "somebody else saved there meanwhile" if refusal.replaced else f"the store said: {refusal.answer}"
        kept = "; what was uploaded stays, and the same save again goes on with it" if self._journal else ""
        raise SaveError(f"{place}: nothing was saved: {said}{kept}")

    def _put_beside(self, name: str) -> Refusal | None:
        return self._address.store.put((self._address / name).key, self.folder / name, "overwrite")

    def _afterwards(self, name: str, do: Callable[[str], Refusal | None]) -> None:
        try:
            said = refusal.answer if (refusal := do(name)) else ""
        except Exception as error:
            said = str(error) if isinstance(error, HotweightsError) else Refusal.of(error).answer
        if said:
            self.warnings.append(f"{self._address / name}: the new version is complete, but then this failed: {said}")

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _keep(self, name: str) -> None:
        place = self._address / name
        if self._into and place.is_object() and text_of(place) != (self.folder / name).read_bytes():
            raise SaveError(
                f"{place}: is there with other content, and nothing was saved; remove it, or save to another address"
            )

    def _exists(self, name: str) -> bool:
        return name in self._there


def _described(file: Path) -> list[object]:
    """The size and the digest of a file."""
    digest = xxhash.xxh3_128()
    with open(file, "rb") as content:
        while piece := content.read(_PIECE):
            digest.update(piece)
    return [file.stat().st_size, digest.hexdigest()]
