"""HubCache: what the hub's own clients have downloaded to this machine. It is only read, and the hub is not asked here.

Layout: ``models--org--name/snapshots/<commit>/`` holds the files, ``refs/<revision>`` names a commit. Source:
https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...errors import CheckpointError
from ..files.directory import find
from ..files.index import files_named_by
from ..files.layout import SAFETENSORS
from .hub import Repository, home

_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubCache:
    """The cache of one repository. ``environ`` says where it lies."""

    def __init__(self, which: Repository, environ: Mapping[str, str]) -> None:
        folder = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or f"{home(environ)}/hub"
        self._root = Path(os.path.expandvars(os.path.expanduser(folder)))
        self._folder = self._root / "--".join([which.kind, *which.name.split("/")])
        self._which = which

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a commit: what that holds never changes."""
        return _COMMIT.fullmatch(self._which.revision) is not None

    @property
    def commit(self) -> str | None:
        """The commit that the revision is, or led to when it was downloaded; ``None`` if that is not known here."""
        if self.is_commit:
            return self._which.revision
        try:
            said = (self._folder / "refs" / self._which.revision).read_text(errors="replace").strip()
        except (OSError, ValueError):
            return None
        return said if _COMMIT.fullmatch(said) else None

    def place(self, commit: str | None, key: str, variant: str | None = None, *, usual: bool) -> Path | None:
        """Where a file or a folder of a commit lies; ``None`` if it is not here, or its weights are not all here.

        With ``usual``, weights count only under the names that ``from_pretrained`` looks for: of a model that was not
        downloaded an adapter may be here.
        """
        if commit is None or ".." in key.split("/"):
            return None
        place = self._folder / "snapshots" / commit / key
        try:
            if place.is_dir():
                choice = find(place, SAFETENSORS, variant)
                names = (choice.index,) if choice.index else choice.files
                if usual and not (choice.known and len(names) == 1):
                    return None
                return place if all(_whole(place / name) for name in names) else None
            return place if _whole(place) else None
        except CheckpointError:
            return None

    def absent(self, keys: Iterable[str]) -> CheckpointError:
        """The error where no hub may be asked, and something is not here."""
        keys = [key for key in keys if key]
        options = "" if self._which.revision == "main" else f" --revision {shlex.quote(self._which.revision)}"
        if self._which.kind != "models":
            options += f" --repo-type {self._which.kind.removesuffix('s')}"
        command = f"hf download {self._which.name}{options}"
        known = sorted(
            path.name for path in (self._folder / "snapshots").glob("*") if self.place(path.name, "", usual=False)
        )
        other = (
            "" if self.commit in known or not known else f"; it holds {', '.join(known)}, which can be given behind @"
        )
        what = f" {', '.join(keys)} of" if keys else ""
        return CheckpointError(
            f"{self._which.shown}: HF_HUB_OFFLINE says that no hub may be asked, and{what} this revision is not whole "
            f"in the cache {self._root}{other}. Without that variable, `{command}` brings it there"
        )


def _whole(file: Path) -> bool:
    """Whether a file is there, and of an index all that it names."""
    if not file.is_file():
        return False
    return file.suffix != ".json" or all((file.parent / name).is_file() for name in files_named_by(file))
