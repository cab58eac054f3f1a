"""Address: a place in a store, such as ``s3://bucket/model``; and the store that an address and its options lead to."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from ...arguments import check_count, check_kind, check_seconds, shown
from ...errors import StoreError, UsageError
from ...notices import log
from ..files.place import Remote
from .cache import LIMIT, Cache
from .client import OF_CLIENT, package_store
from .filesystem import Filesystem
from .hub import OPTIONS as HUB_OPTIONS
from .hub import Hub, offline, repository
from .hub_cache import HubCache
from .object import Object
from .service import UPLOAD_PART, Obstore, Service
from .store import DEADLINE, LONGER, SLOWEST, Store

SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "http", "https", "hf")
"""What addresses of stores begin with."""
WRITTEN = ("s3", "s3a", "gs", "az", "abfs", "abfss")
"""Those of them that can be written to."""
# Two letters at least: one is a drive of Windows. Path() makes one slash of two.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?P<rest>[^/].*)", re.DOTALL)
_BARE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/{0,3})")
_AT = ("abfs", "abfss", "hf")  # where no user stands before that sign
_OBJECTS = (".safetensors", ".json", ".bin", ".pt", ".pth")  # How the names of objects end; others are directories.
_OURS = ("deadline", "requests", "cache_dir", "cache_nbytes")
_WEB_LOGIN = 'give what the server asks for as store={"default_headers": {"Authorization": "Bearer TOKEN"}}'
_S3_LOGIN = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a bucket that everybody may read. "
    "S3 says this of what is not there, too, where it may not be listed"
)
_AZURE_LOGIN = "set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN"
_LOGIN = {
    "http": _WEB_LOGIN,
    "https": _WEB_LOGIN,
    "s3": _S3_LOGIN,
    "s3a": _S3_LOGIN,
    "gs": "set GOOGLE_SERVICE_ACCOUNT or GOOGLE_APPLICATION_CREDENTIALS to the file of an account that may read it",
    "az": _AZURE_LOGIN,
    "abfs": _AZURE_LOGIN,
    "abfss": _AZURE_LOGIN,
    "hf": "set HF_TOKEN, or run `hf auth login`; gated models are granted on their pages",
}
"""What to do where a store refuses the credentials, by scheme."""


class Parts(NamedTuple):
    """An address in parts."""

    scheme: str
    host: str  # with the user's name and password, if it has them
    key: str

    @property
    def shown(self) -> str:
        """What messages may say of it, up to the key."""
        host = self.host if self.scheme in _AT else self.host.rpartition("@")[2]
        return f"{self.scheme}://{host}"


def parts_of(text: str) -> Parts | None:
    """The parts of an address of any scheme; ``None`` of what is none, or is a path that exists."""
    match = _ADDRESS.fullmatch(text)
    if os.path.exists(text):
        return None
    if match is None:
        _refuse_bare(text)
        return None
    scheme = match[1].lower()
    if scheme == "hf":
        which, key = repository(match["rest"])
        return Parts(scheme, which.shown.removeprefix("hf://"), key)
    host, _, key = match["rest"].partition("/")
    return Parts(scheme, host, key)


def is_address(text: str) -> bool:
    """Whether it leads to a store, the web or a hub."""
    parts = parts_of(text)
    return parts is not None and parts.scheme in SCHEMES


def names_a_folder(text: str) -> bool:
    """Whether it is an address, and not that of one object."""
    return is_address(text) and not text.endswith(_OBJECTS)


def _refuse_bare(text: str) -> None:
    """Refuse a scheme alone: without what follows it, it would be looked for as a file."""
    match = _BARE.fullmatch(text)
    if match and ("/" in match[2] or match[1].lower() in SCHEMES):
        scheme = match[1].lower()
        place = {"hf": "org/name", "http": "host/folder", "https": "host/folder"}.get(scheme, "bucket/folder")
        cure = f"{scheme}://{place}" if scheme in SCHEMES else "a path, or an address such as s3://bucket/folder"
        # A path may have lost the slashes by now.
        raise UsageError(f"{match[1]}://: the address ends after its scheme; is a variable not set? Give {cure}")


def connect(
    addresses: Sequence[Parts], options: object, *, writes: bool = False, longer: str = LONGER
) -> list[Address]:
    """A connection to the store of these addresses. Nothing is asked yet. The caller closes their ``store``.

    With ``writes`` the package itself tries again what is written: a part of an object is known to it alone.

    Raises:
        MissingPackage: ``obstore`` is not installed.
        UsageError: an option is unknown, or the address has a question mark.
    """
    assert options is None or isinstance(options, Mapping)  # by ``check_store``
    options = dict(options or {})
    ours: dict[str, Any] = {name: options.pop(name) for name in _OURS if name in options}
    check_seconds(**{f'store={{"{name}"}}': value for name, value in ours.items() if name == "deadline"})
    check_count(1, **{f'store={{"{name}"}}': value for name, value in ours.items() if name == "requests"})
    keys = [_key(parts) for parts in addresses]
    deadline = ours.get("deadline", DEADLINE)
    cache = cache_of(ours.pop("cache_dir", None), ours.pop("cache_nbytes", None))
    service: Service
    if addresses[0].scheme == "hf":
        service = _hub(addresses[0], options, deadline)
    else:
        # So few parts are on their way that a slow link is done with each before it counts as stalled.
        uploads = max(1, min(8, int(deadline * SLOWEST / UPLOAD_PART)))
        url = f"{addresses[0].scheme}://{addresses[0].host}"
        reading, writing = (
            package_store(url, addresses[0].shown, dict(options), deadline, each) for each in (False, writes)
        )
        service = Obstore(reading, writing, uploads)
    store = Store(service, addresses[0].shown, login=_LOGIN[addresses[0].scheme], longer=longer, **ours)
    store.cache = cache
    return [Address(store, key) for key in keys]


def cache_of(folder: Any, nbytes: Any) -> Cache | None:
    """The cache that options ask for.

    Raises:
        UsageError: they make no sense, or the directory is others', too.
    """
    if folder is None and nbytes is not None:
        raise UsageError("cache_nbytes= is the size of a cache; name its directory with cache_dir=")
    check_kind("cache_dir", folder, (str, os.PathLike), "the path of a directory")
    check_count(1, **{} if nbytes is None else {"cache_nbytes": nbytes})
    return None if folder is None else Cache(folder, LIMIT if nbytes is None else nbytes)


def downloaded(
    addresses: Sequence[Parts], options: object, variant: str | None, subfolder: str | None
) -> list[Path] | None:
    """Where the hub's own client has put what these addresses of a hub name; ``None`` if it has not, or not all.

    A commit never changes, and nobody is asked. Of a branch or a tag the hub is asked to which commit it leads now;
    where it gives no answer, it is the one to which it led when it was downloaded.

    Raises:
        CheckpointError: no hub may be asked, by ``HF_HUB_OFFLINE``, and it is not here; it says what to type.
    """
    cache = HubCache(repository(addresses[0].host)[0], os.environ)
    keys = [f"{parts.key}/{subfolder or ''}".strip("/") for parts in addresses]

    def whole(commit: str | None, *, usual: bool) -> list[Path] | None:
        places = [cache.place(commit, key, variant, usual=usual) for key in keys]
        return [place for place in places if place is not None] if None not in places else None

    if offline(os.environ):
        if (found := whole(cache.commit, usual=False)) is None:
            raise cache.absent(keys)
        return found
    found = whole(cache.commit, usual=True)
    if found is None or cache.is_commit:
        return found
    try:
        return whole(_commit(addresses[0], options), usual=True)
    except StoreError as error:
        log(logging.WARNING, "%s; so what was downloaded before is read: %s", error, found[0])
        return found


def _commit(parts: Parts, options: object) -> str | None:
    """The commit that a hub's revision leads to now. The hub has as long to say so as its own clients give it."""
    assert options is None or isinstance(options, Mapping)  # by ``check_store``
    hub = _hub(parts, {name: value for name, value in (options or {}).items() if name not in _OURS})
    said = os.environ.get("HF_HUB_ETAG_TIMEOUT", "")
    patience = float(said) if said.isdecimal() and int(said) else 10.0
    store = Store(
        hub, parts.shown, deadline=min(patience, (options or {}).get("deadline", patience)), login=_LOGIN["hf"]
    )
    try:
        store.names("")
    finally:
        store.close()
    return hub.commit


def _hub(parts: Parts, options: dict[str, Any], deadline: float = DEADLINE) -> Hub:
    of_hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}

    def open_store(base: str, headers: dict[str, str]) -> Any:
        given = {**headers, **options.get("default_headers", {})}
        headed = {**options, "default_headers": given} if given else dict(options)
        return package_store(base, parts.shown, headed, deadline, False)

    if unknown := options.keys() - {*OF_CLIENT}:
        raise UsageError(f"{parts.shown}: store= has options that a hub does not know: {', '.join(sorted(unknown))}")
    return Hub(repository(parts.host)[0], of_hub, open_store)


def _key(parts: Parts) -> str:
    if not parts.scheme.startswith("http"):
        return parts.key.strip("/")
    if "?" in parts.key or "#" in parts.key:
        raise UsageError(
            f"{parts.shown}/{urlsplit(parts.key).path}: what stands behind a question mark leads to one object "
            "only, and is often a secret; download the object, and give its path"
        )
    return unquote(parts.key).strip("/")


class Address(Remote):
    """A place in a store."""

    def __init__(self, store: Store, key: str) -> None:
        self.store = store
        self.key = key

    @property
    def name(self) -> str:
        """See ``Remote``."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> Address:
        """See ``Remote``."""
        return Address(self.store, self.key.rpartition("/")[0])

    def __truediv__(self, name: str) -> Address:
        names = [part for part in f"{self.key}/{name}".split("/") if part not in ("", ".")]
        return Address(self.store, "/".join(names))

    def exists(self) -> bool:
        """See ``Remote``."""
        return self.is_dir() or self.is_object()

    def is_object(self) -> bool:
        """See ``Remote``."""
        return bool(self.key) and self.store.there(self.key)

    def is_dir(self) -> bool:
        """See ``Remote``."""
        return not self.name.endswith(_OBJECTS)

    def names(self) -> list[str]:
        """See ``Remote``."""
        return self.store.names(self.key)

    def open(self) -> Object:
        """See ``Remote``."""
        return Object(self.store, self.key)

    def open_soon(self, places: Iterable[Remote]) -> None:
        """See ``Remote``."""
        self.store.open_soon(place.key for place in places if isinstance(place, Address))

    def __fspath__(self) -> str:
        return self.store.path(self.key)

    def __str__(self) -> str:
        return self.store.path(self.key)

    def __repr__(self) -> str:
        return f"<Address {self}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and (other.store is self.store and other.key == self.key)

    def __hash__(self) -> int:
        return hash(self.key)


def check_store(store: object) -> None:
    """Raise ``UsageError`` unless it is a mapping of options, an object that is asked itself, or ``None``."""
    if not (store is None or isinstance(store, Mapping) or is_store(store)):
        raise UsageError(
            'store= is a mapping of options, such as {"region": "eu-west-1"}, a store of obstore, or a file system of '
            f"fsspec; found {shown(store)}"
        )


def is_store(store: object) -> bool:
    """Whether it is a store of obstore, or a file system of fsspec: neither package is imported to find out."""
    return _of(store, "obstore") or _of(store, "fsspec")


def no_address(**options: object) -> None:
    """Raise ``UsageError`` if an option is given that only addresses have."""
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{name}= is for addresses, such as s3://bucket/model; leave it out")


def with_options(store: object, *, deadline: float | None = None, **more: object) -> object:
    """Options, with those besides that are not ``None``.

    Raises:
        UsageError: one is said twice.
    """
    assert store is None or isinstance(store, Mapping)  # by ``check_store``
    said = {name: value for name, value in {"deadline": deadline, **more}.items() if value is not None}
    if twice := said.keys() & (store or {}).keys():
        name = min(twice)
        raise UsageError(f'{name}= and store={{"{name}"}}: one of them')
    if deadline is not None:
        check_seconds(deadline=deadline)
    return {**(store or {}), **said} if said else store


def within(
    store: object,
    paths: Iterable[str],
    *,
    writes: bool = False,
    deadline: float | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> list[Address]:
    """Places in a store of the caller's, which stays open. The caller closes their ``store``.

    Raises:
        UsageError: it is to be written to, and is a file system.
    """
    deadline = DEADLINE if deadline is None else deadline
    check_seconds(deadline=deadline)
    service: Service = Obstore(store) if _of(store, "obstore") else Filesystem(store)
    shown = type(store).__name__
    if isinstance(service, Filesystem):
        if writes:
            raise UsageError("file systems of fsspec are only read; save to a directory, and upload that")
        protocol = getattr(store, "protocol", "")
        shown = f"{protocol if isinstance(protocol, str) else protocol[0]}:/"
    mine = Store(service, shown, deadline=deadline, longer="deadline=seconds waits longer")
    mine.cache = cache_of(cache_dir, None)
    return [Address(mine, path.strip("/")) for path in paths]


def _of(store: object, package: str) -> bool:
    return any(kind.__module__.partition(".")[0] == package for kind in type(store).__mro__)
