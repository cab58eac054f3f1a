"""Hub: a model on a hub, ``hf://org/name@revision``, asked as its own clients ask: by its web addresses.

The revision is looked up once; from then on only the commit is asked for that it led to. Nothing is kept on disk;
what the hub's own clients have kept there is in ``hub_cache.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from ...errors import CheckpointError, UsageError
from .service import Body, Obstore, Pin

_ADDRESS = re.compile(
    r"(?P<kind>datasets/|spaces/)?(?P<repo>[\w.-]+/[\w.-]+|[\w.-]+(?=@|$))"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
_YES = ("1", "ON", "YES", "TRUE")
OPTIONS = ("endpoint", "token")
"""Options of a hub, besides those of the client."""


class Repository(NamedTuple):
    """Which repository of a hub, and which revision of it."""

    kind: str  # "models", "datasets" or "spaces"
    name: str
    revision: str

    @property
    def shown(self) -> str:
        """Its address."""
        kind = "" if self.kind == "models" else f"{self.kind}/"
        return f"hf://{kind}{self.name}{'' if self.revision == 'main' else f'@{self.revision}'}"


def repository(text: str) -> tuple[Repository, str]:
    """The repository that an address names behind ``hf://``, and the path within it.

    Raises:
        UsageError: it names none.
    """
    match = _ADDRESS.fullmatch(text.strip("/"))
    if match is None:
        raise UsageError(f"hf://{text}: a model's address is hf://org/name, or hf://org/name@revision/folder")
    kind = (match["kind"] or "models/").rstrip("/")
    return Repository(kind, match["repo"], unquote(match["revision"] or "main")), match["path"] or ""


class Hub:
    """A service that reads one repository. ``open_store`` makes a store of the package for a web address."""

    def __init__(self, which: Repository, options: dict[str, Any], open_store: Callable[[str, dict[str, str]], Any]):
        endpoint = options.get("endpoint") or os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        self._endpoint = str(endpoint).rstrip("/")
        token = _token(options.get("token"))
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._which, self._open_store = which, open_store
        self._lock = asyncio.Lock()
        self._commit: tuple[str, Obstore, frozenset[str]] | None = None  # Set once, in the loop's thread.

    @property
    def commit(self) -> str | None:
        """The commit that the revision led to; ``None`` before anything was asked."""
        return None if self._commit is None else self._commit[0]

    async def get(self, key: str, start: int, stop: int, pin: Pin | None) -> Body:
        """See ``Service``. The tags of mirrors differ, and what a commit holds never does."""
        files, names = await self._files()
        if key not in names:
            raise FileNotFoundError(key)
        body = await files.get(key, start, stop, None)
        return Body(self._pin(body.pin), body.chunks)

    async def head(self, key: str) -> Pin:
        """See ``Service``."""
        files, names = await self._files()
        if key not in names:
            raise FileNotFoundError(key)
        return self._pin(await files.head(key))

    async def names(self, key: str) -> list[str]:
        """See ``Service``."""
        start = f"{key}/" if key else ""
        _, names = await self._files()
        return sorted({name[len(start) :].partition("/")[0] for name in names if name.startswith(start)})

    async def below(self, key: str) -> dict[str, Pin]:
        """See ``Service``."""
        raise UsageError(f"{self._which.shown}: a commit never changes; open it, or another revision, by its address")

    async def tree(self, key: str) -> list[str]:
        """See ``Service``."""
        start = f"{key}/" if key else ""
        _, names = await self._files()
        return sorted(name[len(start) :] for name in names if name.startswith(start))

    async def put(self, key: str, content: Path | bytes, mode: object) -> None:
        """See ``Service``."""
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        """See ``Service``."""
        raise NotImplementedError

    async def _files(self) -> tuple[Obstore, frozenset[str]]:
        """The files of the commit that the revision led to when it was asked for first, and their names."""
        async with self._lock:
            if self._commit is None:
                kind, name, revision = self._which
                base = f"{self._endpoint}/api/{kind}/{name}/revision/{quote(revision, safe='')}"
                said = None
                with contextlib.suppress(FileNotFoundError):
                    said = await Obstore(self._open_store(base, self._headers)).whole("")
                if said is None:
                    raise CheckpointError(
                        f"{self._which.shown}: the hub knows no such model or revision", cause="not_found"
                    )
                commit, names = _commit_of(said)
                prefix = "" if kind == "models" else f"{kind}/"
                base = f"{self._endpoint}/{prefix}{name}/resolve/{commit}"
                self._commit = commit, Obstore(self._open_store(base, self._headers)), names
            return self._commit[1:]

    def _pin(self, found: Pin) -> Pin:
        assert self._commit is not None, "it was looked up"
        return Pin(found.size, self._commit[0], None)


def _commit_of(said: bytes) -> tuple[str, frozenset[str]]:
    try:
        facts = json.loads(said)
        commit = str(facts["sha"])
        if re.fullmatch(r"[0-9a-f]{6,64}", commit) is None:
            raise ValueError
        return commit, frozenset(str(each["rfilename"]) for each in facts["siblings"])
    except (ValueError, KeyError, TypeError):
        raise ValueError("something else than a revision, which was asked for") from None


def _token(given: object) -> str | None:
    """What logs in: that of ``store=``, or else the one that the hub's own clients would take."""
    if given is False:
        return None
    if isinstance(given, str):
        return given
    if os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in _YES and given is not True:
        return None
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if said := os.environ.get(name, "").strip():
            return said
    try:
        return _token_file(os.environ).read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def home(environ: Mapping[str, str]) -> str:
    """The folder in which the hub's clients keep everything."""
    return environ.get("HF_HOME") or os.path.join(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")


def offline(environ: Mapping[str, str]) -> bool:
    """Whether no hub may be asked, as its clients read it."""
    return (environ.get("HF_HUB_OFFLINE") or environ.get("TRANSFORMERS_OFFLINE") or "").upper() in _YES


def _token_file(environ: Mapping[str, str]) -> Path:
    return Path(os.path.expandvars(environ.get("HF_TOKEN_PATH") or os.path.join(home(environ), "token"))).expanduser()
