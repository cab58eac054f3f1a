"""DirectoryRegister: decisions as files in a directory that all hosts see."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ... import signals
from ...errors import UsageError
from ...sources.files.writer import sync
from .register import Register


@signals.held_throughout
class DirectoryRegister(Register):
    """By ``link``, which fails if there is such a file, on NFS too."""

    def __init__(self, url: str) -> None:
        """Nothing is looked up yet.

        Raises:
            UsageError: it is no ``file:///DIRECTORY``.
        """
        super().__init__(url)
        parts = urlsplit(url)
        if parts.netloc or not os.path.isabs(parts.path):
            raise UsageError(f"a directory that holds decisions looks like file:///shared/run; found {url!r}")
        self._directory = unquote(parts.path)

    def written(self, name: str, content: bytes) -> bytes:
        """What lies in the file of this name."""
        path = os.path.join(self._directory, name)
        beside = f"{path}.{secrets.token_hex(8)}"
        try:
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # Else a host that loses power might forget what others have done.
            with contextlib.suppress(OSError):  # Lost answers of NFS, too: what lies there counts.
                os.link(beside, path)
            sync(Path(self._directory))  # A decision that is gone could be made otherwise.
        finally:
            with contextlib.suppress(OSError):
                os.unlink(beside)
        with open(path, "rb") as file:
            return file.read()

    def remove(self, name: str) -> None:
        """Remove the file."""
        os.unlink(os.path.join(self._directory, name))
