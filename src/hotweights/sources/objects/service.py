"""Service: one store as its package speaks to it, a request at a time. It neither tries again nor waits for others."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, Protocol

from ...errors import HotweightsError, UsageError

CHUNK = 512 * 1024
"""Bytes that a body is given in, at least: each is a step in Python, and what a failed try may lose."""


@dataclass(frozen=True, slots=True)
class Pin:
    """Which object an address led to when it was opened: its size, and what tells it from a later one."""

    size: int
    tag: str | None
    modified: object
    number: str | None = None  # of this version, in stores that count them: Google's conditions are about it

    @property
    def only_over(self) -> dict[str, str]:
        """The mode of a ``put`` that writes over this object only. Empty where nothing tells it from others."""
        return {name: said for name, said in (("e_tag", self.tag), ("version", self.number)) if said}

    def changed(self, now: Pin) -> str | None:
        """What shows that ``now`` is another object; ``None`` if nothing does."""
        if self.tag and now.tag:  # Who has one may give another time from each of its machines.
            return None if self.tag == now.tag else f"its ETag was {self.tag} and is {now.tag}"
        for what, old, new in (("size", self.size, now.size), ("time", self.modified, now.modified)):
            if old != new:
                return f"its {what} was {old} and is {new}"
        return None


@dataclass(frozen=True, slots=True)
class Body:
    """An answer that has begun: the object as it is now, and its bytes, which come while they are iterated."""

    pin: Pin
    chunks: AsyncIterator[bytes]


class Service(Protocol):
    """What a store is asked. Any exception but those named is an answer: ``Refusal.of`` says what it means."""

    async def get(self, key: str, start: int, stop: int, pin: Pin | None) -> Body:
        """The bytes of an object, fewer where it ends before. ``FileNotFoundError`` if there is none."""

    async def head(self, key: str) -> Pin:
        """The object as it is now. ``FileNotFoundError`` if there is none."""

    async def names(self, key: str) -> list[str]:
        """The names of what lies directly below this key."""

    async def below(self, key: str) -> dict[str, Pin]:
        """Every object below this key, by what its key has after that."""

    async def tree(self, key: str) -> list[str]:
        """The names of all objects below this key, those in folders by ``folder/name``."""

    async def put(self, key: str, content: Path | bytes, mode: object) -> None:
        """Write an object from a file, whole or not at all; ``mode`` says over what, in obstore's words."""

    async def delete(self, key: str) -> None:
        """Delete an object."""


UPLOAD_PART = 8 * 1024 * 1024
"""Bytes of one request of a larger object that is written."""
_RETRIED = re.compile(r"after (\d+) retries")
_STATUS = re.compile(r"status code: (\d{3})(?: ([A-Za-z][A-Za-z -]*))?")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_OF_CREDENTIALS = ("ExpiredToken", "TokenRefreshRequired", "RequestTimeTooSkewed", "InvalidToken")
_BRIEF = ("RequestTimeout", "SlowDown", "ServerBusy")
_HTTP = "its endpoint is not encrypted, which was not allowed"
_WORDS = (
    ("Connection refused", "the connection was refused"),
    ("ConnectionRefused", "the connection was refused"),
    ("dns error", "its host has no address"),
    ("certificate", "its certificate is not trusted"),
    ("BadScheme", f'{_HTTP}: store={{"allow_http": True}} allows it, or AWS_ALLOW_HTTP=true'),
    ("Decode", "the body ended before its end"),
    ("body error", "the body ended before its end"),
    ("Requested", "another range than was asked for"),
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request brought nothing, in words that hold no secret: packages quote addresses, headers and bodies."""

    answer: str
    again: bool  # whether asking again may help
    login: bool = False
    ignores_ranges: bool = False
    replaced: bool = False
    beyond: bool = False  # the range begins behind the object's end
    gone: bool = False
    tries: int = 1  # how often the package itself has asked

    @classmethod
    def of(cls, error: BaseException) -> Refusal:
        """What an exception of a package means."""
        retried = _RETRIED.search(str(error))
        return replace(cls._of(error), tries=1 + int(retried[1] if retried else 0))

    @classmethod
    def _of(cls, error: BaseException) -> Refusal:
        kind, text = type(error).__name__, str(error)
        if isinstance(error, ValueError) and "was asked for" in text:
            return cls(text, again=True)
        if isinstance(error, TimeoutError) or "timed out" in text or "TimedOut" in text:
            return NOTHING
        if isinstance(error, FileNotFoundError):
            return cls("404 Not Found", again=False, gone=True)
        status, code = _STATUS.search(text), _CODE.search(text)
        answer = " ".join(filter(None, [status[1] if status else "", _reason(status), code[1] if code else ""]))
        number = int(status[1]) if status else 0
        if kind in ("PreconditionError", "AlreadyExistsError") or isinstance(error, FileExistsError) or number == 412:
            return cls(answer or "412", again=False, replaced=True)
        if "NotPartial" in text or "RangeNotSupported" in text:
            return cls("all of the object instead of a range", again=False, ignores_ranges=True)
        if isinstance(error, PermissionError):
            return cls("no permission", again=False, login=True)
        expired = code is not None and code[1] in _OF_CREDENTIALS
        if kind in ("UnauthenticatedError", "PermissionDeniedError") or number in (401, 403) or expired:
            return cls(answer or "no permission", again=False, login=True)
        if number:
            brief = number >= 500 or number in (408, 425, 429) or (code is not None and code[1] in _BRIEF)
            return cls(answer, again=brief, beyond=number == 416)
        if kind in ("NotSupportedError", "InvalidPathError", "NotImplementedError"):
            return cls(f"nothing: its package cannot do that ({kind})", again=False)
        words = next((words for sign, words in _WORDS if sign in text), "the connection was lost")
        return cls(words, again=not words.startswith(_HTTP))


NOTHING = Refusal("nothing came", again=True)
"""No answer in time."""


def _reason(status: re.Match[str] | None) -> str:
    return (status[2] or "").strip() if status else ""


def package_error(error: BaseException) -> bool:
    """Whether it is an answer of a package, and neither ours nor a sign that the program ends."""
    return isinstance(error, Exception) and not isinstance(error, HotweightsError)


class Obstore:
    """A store that the package ``obstore`` reaches: S3, Google, Azure, HTTP, and what its users bring.

    ``writing`` is the same one for what is written, where another one is to try again. At most ``uploads`` parts of an
    object that is written are on their way.
    """

    def __init__(self, store: Any, writing: Any = None, uploads: int = 8) -> None:
        import obstore

        self._package: Any = obstore
        self._store = store
        self._writing, self._uploads = writing or store, uploads
        self._lists = type(store).__name__ != "HTTPStore"

    async def get(self, key: str, start: int, stop: int, pin: Pin | None) -> Body:
        """See ``Service``."""
        options: dict[str, object] = {"range": (start, stop)}
        if pin is not None and pin.tag and not pin.tag.startswith("W/"):  # A weak tag matches nothing, by the standard.
            options["if_match"] = pin.tag
        result = await self._package.get_async(self._store, key, options=options)
        if next(iter(result.range)) != start:
            raise ValueError("another range than was asked for")
        return Body(_pin(result.meta), result.stream(min_chunk_size=CHUNK))

    async def whole(self, key: str) -> bytes:
        """All of what is small. ``FileNotFoundError`` if there is none."""
        result = await self._package.get_async(self._store, key)
        return bytes(await result.bytes_async())

    async def head(self, key: str) -> Pin:
        """See ``Service``."""
        return _pin(await self._package.head_async(self._store, key))

    async def names(self, key: str) -> list[str]:
        """See ``Service``. The web has no lists: it is asked for what ``from_pretrained`` looks for."""
        if not self._lists:
            return await self._those_of(USUAL, key)
        listed = await self._package.list_with_delimiter_async(self._store, prefix=key or None)
        paths = [each["path"] for each in listed["objects"]] + list(listed["common_prefixes"])
        return [path.rstrip("/").rpartition("/")[2] for path in paths]

    async def below(self, key: str) -> dict[str, Pin]:
        """See ``Service``."""
        if not self._lists:
            raise UsageError("the web has no lists; name the checkpoint itself, or a place where a sender publishes")
        found = {}
        async for batch in self._package.list(self._store, prefix=key or None):
            found.update({each["path"][len(key) :].lstrip("/"): _pin(each) for each in batch})
        return found

    async def tree(self, key: str) -> list[str]:
        """See ``Service``. The web is asked for what models usually have beside their weights."""
        return list(await self.below(key)) if self._lists else await self._those_of(BESIDE, key)

    async def put(self, key: str, content: Path | bytes, mode: object) -> None:
        """See ``Service``."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        options: dict[str, Any] = {"chunk_size": max(UPLOAD_PART, size // 9000)}  # S3 takes 10,000 of them.
        if mode != "overwrite":
            options["use_multipart"] = False  # Only then are conditions kept.
        await self._package.put_async(self._writing, key, content, mode=mode, max_concurrency=self._uploads, **options)

    async def delete(self, key: str) -> None:
        """See ``Service``."""
        await self._package.delete_async(self._writing, key)

    async def _those_of(self, names: tuple[str, ...], key: str) -> list[str]:
        there = await asyncio.gather(*(self._there(f"{key}/{name}".lstrip("/")) for name in names))
        return list(compress(names, there))

    async def _there(self, key: str) -> bool:
        try:
            await self._package.head_async(self._store, key)
        except FileNotFoundError:
            return False
        except Exception as error:
            if Refusal.of(error).login:  # Buckets that may not be listed answer so for what is not there.
                return False
            raise
        return True


USUAL = (
    *("model.safetensors", "model.safetensors.index.json", "model.fp16.safetensors", "model_index.json"),
    *("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
    *("diffusion_pytorch_model.fp16.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"),
)
"""The names of weights that are looked for where nothing can be listed."""
BESIDE = (
    *("config.json", "generation_config.json", "adapter_config.json", "preprocessor_config.json"),
    *("processor_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "README.md", "LICENSE"),
)
"""The same of what lies beside weights."""


def _pin(meta: Any) -> Pin:
    return Pin(int(meta["size"]), meta.get("e_tag"), meta.get("last_modified"), meta.get("version"))
