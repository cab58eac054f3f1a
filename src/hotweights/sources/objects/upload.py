"""Upload: a checkpoint that is written to a temporary folder, and from there to a store, the index last."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import CheckpointError, Closed, SaveError
from ..files.staging import INDEX, WHOLE, Draft, replaced_by
from .address import Address
from .service import Refusal, package_error


class Upload(Draft):
    """Where one checkpoint for a store is written. As a context manager it removes what was not published.

    An object appears whole or not at all. In a folder that holds a checkpoint new shards get names that no object has,
    and the index is replaced last, if it still is the one that was found: readers see the old version or the new one.
    """

    def __init__(self, where: Address) -> None:
        self._address = where
        is_file = not where.is_dir()
        self._there = set() if is_file else set(where.names())
        self._into = bool(self._there)
        self._found = where.store.head((where / INDEX).key).only_over if INDEX in self._there else {}
        self._old = replaced_by(where, self._there)
        super().__init__(where, Path(tempfile.mkdtemp(prefix="hotweights-")), is_file=is_file)

    def __enter__(self) -> Upload:
        return self

    def publish(self, names: Sequence[str], index: str | None) -> None:
        """Upload the files, the index last. After that nothing raises: ``warnings`` says what failed."""
        last = names[0] if index is None else index
        for name in [] if index is None else names:
            self._moved.append(name)
            self._put(name)
        if not self._into:  # Nobody opens the folder yet.
            for name in self._beside:
                self._put(name)
        if self.is_file:
            self._put(last, self._address)
        elif index is None:
            self._put(last)
        else:
            self._put(last, mode=self._only_over_what_was_found())
        self._published = True
        for name in self._beside if self._into else ():
            self._afterwards(name, self._put)
        # First what readers take before an index: until then they see the old version.
        for name in sorted(self._old - {*names}, key=lambda name: name != WHOLE):
            self._afterwards(name, lambda name: self._address.store.delete((self._address / name).key))

    def _only_over_what_was_found(self) -> object:
        if INDEX not in self._there:
            return "create"
        return self._found or "overwrite"

    def _put(self, name: str, to: Address | None = None, *, mode: object = "overwrite") -> None:
        place = to or self._address / name
        try:
            self._address.store.put(place.key, self.folder / name, mode)
        except Exception as error:
            if isinstance(error, Closed) or not package_error(error):
                raise
            refusal = Refusal.of(error)
            said = "somebody else saved there meanwhile" if refusal.replaced else f"the store said: {refusal.answer}"
        else:
            return
        raise SaveError(f"{place}: nothing was saved: {said}")

    def _afterwards(self, name: str, do: Callable[[str], object]) -> None:
        try:
            do(name)
        except Exception as error:
            said = str(error) if isinstance(error, (SaveError, CheckpointError)) else Refusal.of(error).answer
            self.warnings.append(f"{self._address / name}: the new version is complete, but then this failed: {said}")

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in self._moved if not self._published else ():
            self._afterwards(name, lambda name: self._address.store.delete((self._address / name).key))

    def _exists(self, name: str) -> bool:
        return name in self._there
