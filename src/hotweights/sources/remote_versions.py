"""RemoteVersions: the checkpoints that appear in a store, found by one list of all its objects for each look."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, Closed, StoreError
from ..notices import log
from .files.listing import list_checkpoint
from .objects.address import Address
from .objects.run import Pointer, Run
from .objects.service import Pin
from .versions import INDEX, WEIGHTS, Files, Status, Version, Versions


class RemoteVersions(Versions):
    """What ``follow`` gives for an address. All objects are listed at once, with their sizes, times and tags."""

    def __init__(self, run: Run, *options: Any) -> None:
        super().__init__(run.where, *options)  # type: ignore[arg-type]
        self._run = run
        self._listed: dict[Address, Files] = {}
        self._answered = False

    def look(self) -> list[Version]:
        """See ``Versions``.

        Raises:
            StoreError: the store refused the first time. Later it is logged, and waited for.
        """
        try:
            found = super().look()
        except Closed:
            if not self._closed.is_set():
                raise
            return []
        except StoreError as error:
            if not self._answered:
                raise
            if not self._absent:
                log(logging.WARNING, "%s cannot be listed; waiting for it: %s", self._directory, error)
            self._absent = f"it cannot be listed; waiting for it: {error}"
            return []
        self._absent, self._answered = "", True
        return found

    def close(self) -> None:
        """See ``Versions``."""
        super().close()
        self._run.close()

    def _pointer(self) -> Pointer | None:
        try:
            return self._run.read()[0]
        except StoreError:
            raise
        except CheckpointError:
            return None

    def _path(self, folder: str) -> Path | str:
        return f"{self._run.address}/{folder}".rstrip("/")

    def _name(self) -> str:
        return str(self._directory.name)

    def _places(self) -> list[Any]:
        """Where versions may lie. What lies there is listed for all of them."""
        self._listed = {self._directory: {}}
        objects = [
            (*path.rpartition("/")[::2], pin)
            for path, pin in sorted(self._directory.store.below(self._directory.key).items())
            if path.endswith((WEIGHTS, INDEX)) or path.rpartition("/")[2] == self._marker
        ]
        folders = {folder for folder, _, _ in objects}
        within = self._match(
            sorted(folder for folder in folders if folder and not folder.startswith(".") and "/" not in folder),
            lambda _: True,
        )
        own = {""} if self._pattern == "*" else set()
        for folder, name, pin in objects:
            if folder in own or folder in within:
                self._listed.setdefault(self._directory / folder, {})[name] = _remote_status(pin)
        return list(self._listed)

    def _files(self, place: Address) -> Files:  # type: ignore[override]
        return self._listed.get(place, {})

    def _weights(self, place: Address) -> Files:
        place.store.forget()  # What was opened at an earlier look and not taken may be another version by now.
        paths = list_checkpoint(place).files
        return {name: status for name, status in self._files(place).items() if str(place / name) in paths}

    def _check_order(self, place: Any, files: Files, weights: Files) -> None:
        # An object is there when it is whole, and those that upload many bring them in any order.
        if self._marker is not None:
            super()._check_order(place, files, weights)


def _remote_status(pin: Pin) -> Status:
    modified = pin.modified.timestamp() if isinstance(pin.modified, datetime) else 0.0
    return Status(hash(pin.tag), pin.size, int(modified * 1e9), 0)
