"""ObjectRegister: decisions as objects in a bucket whose store makes an object only where there is none."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from ... import signals
from ...errors import MissingPackage, UsageError
from ...sources.objects.service import Refusal
from .register import Register

_PATIENCE = 5  # seconds for one request
_process: int | None = None  # which first asked: the package's threads are not in a forked child


@signals.held_throughout
class ObjectRegister(Register):
    """By ``If-None-Match``. Where the store is, and who may write there, is told by the variables of its kind."""

    def __init__(self, url: str) -> None:
        """Nothing is looked up yet.

        Raises:
            UsageError: it is no ``s3://BUCKET/FOLDER``.
        """
        super().__init__(url)
        parts = urlsplit(url)
        if not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
            raise UsageError(f"a bucket that holds decisions looks like s3://bucket/run; found {url!r}")
        self._bucket, self._folder = f"{parts.scheme}://{parts.netloc}", parts.path.strip("/")
        self._made: Any = None

    def written(self, name: str, content: bytes) -> bytes:
        """What is in the object of this name."""
        store, key = self._store(), f"{self._folder}/{name}".lstrip("/")
        try:
            try:
                store.put(key, content, mode="create")
            except Exception as error:  # Also where only the answer was lost: what is there counts.
                try:
                    return bytes(store.get(key).bytes())
                except FileNotFoundError:
                    raise error from None
            return bytes(store.get(key).bytes())
        except Exception as error:  # The package's; its texts quote addresses and headers.
            raise OSError(Refusal.of(error).answer) from None

    def remove(self, name: str) -> None:
        """Delete the object."""
        try:
            self._store().delete(f"{self._folder}/{name}".lstrip("/"))
        except Exception as error:
            raise OSError(Refusal.of(error).answer) from None

    def _store(self) -> Any:
        global _process
        if _process not in (None, os.getpid()):
            raise OSError("this process was forked from one that had asked stores, and cannot; start it by spawn")
        _process = os.getpid()
        if self._made is None:
            try:
                from obstore.store import from_url
            except ImportError as error:
                raise MissingPackage("obstore", "cloud") from error
            seconds = f"{_PATIENCE}s"
            try:
                self._made = from_url(
                    self._bucket,
                    client_options={"timeout": seconds, "connect_timeout": seconds, **_allowing_http()},
                    retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=2 * _PATIENCE)},
                )
            except Exception as error:
                raise OSError(Refusal.of(error).answer) from None
        return self._made


def _allowing_http() -> dict[str, bool]:
    return {"allow_http": True} if os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true") else {}
