"""EtcdRegister: decisions as keys of an etcd, by its HTTP gateway; no package is needed."""

from __future__ import annotations

import base64
import http.client
import json
from typing import Any
from urllib.parse import urlsplit

from ... import signals
from ...errors import UsageError
from .register import Register

_PATIENCE = 5.0  # seconds for one request
_TRIES = 2  # an answer that is lost is asked for again: what was written then counts


@signals.held_throughout
class EtcdRegister(Register):
    """By a transaction that puts a key which was never made. etcd has it on the disks of a majority then."""

    def __init__(self, url: str) -> None:
        """Nothing is looked up yet.

        Raises:
            UsageError: it is no ``etcd://HOST:PORT/PREFIX``.
        """
        super().__init__(url)
        parts = urlsplit(url)
        try:
            self._host, self._port = parts.hostname or "", parts.port or 2379
        except ValueError:
            self._host = ""
        if not self._host or "@" in parts.netloc or parts.query or parts.fragment:
            raise UsageError(f"an etcd that holds decisions looks like etcd://host:2379/run; found {url!r}")
        self._prefix = parts.path.strip("/")

    def written(self, name: str, content: bytes) -> bytes:
        """What the key of this name holds."""
        key = self._key(name)
        answer = self._asked(
            "txn",
            {
                "compare": [{"key": key, "target": "CREATE", "result": "EQUAL", "create_revision": "0"}],
                "success": [{"request_put": {"key": key, "value": _coded(content)}}],
                "failure": [{"request_range": {"key": key}}],
            },
        )
        if answer.get("succeeded"):
            return content
        try:
            return base64.b64decode(answer["responses"][0]["response_range"]["kvs"][0]["value"])
        except (LookupError, TypeError, ValueError) as error:
            raise OSError("it answered something else than etcd does") from error

    def remove(self, name: str) -> None:
        """Delete the key."""
        self._asked("deleterange", {"key": self._key(name)})

    def _key(self, name: str) -> str:
        return _coded(f"{self._prefix}/{name}".encode())

    def _asked(self, what: str, request: object) -> dict[str, Any]:
        reason = ""
        for _ in range(_TRIES):
            connection = http.client.HTTPConnection(self._host, self._port, timeout=_PATIENCE)
            try:
                connection.request("POST", f"/v3/kv/{what}", json.dumps(request), {"Content-Type": "application/json"})
                response = connection.getresponse()
                raw = response.read()
                if response.status == 200:
                    return dict(json.loads(raw))
                reason = f"HTTP status {response.status}"
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(error) or type(error).__name__
            finally:
                connection.close()
        raise OSError(f"{self._host}:{self._port}: {reason}")


def _coded(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
