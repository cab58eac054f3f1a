"""Address: a place in a store, such as ``s3://bucket/model``; and the store that an address and its options lead to."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from ...arguments import check_count, check_kind, check_seconds, shown
from ...errors import MissingPackage, StoreError, UsageError
from ...notices import log
from ..files.place import Remote
from .cache import LIMIT, Cache
from .filesystem import Filesystem
from .hub import OPTIONS as HUB_OPTIONS
from .hub import Hub, offline, repository
from .hub_cache import HubCache
from .object import Object
from .service import Obstore, Service
from .store import Store

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
_ENDPOINTS = ("endpoint", "endpoint_url", "base_url")  # how the options end that name a server
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
_RETRIES = 100  # of the package itself, where it writes: until the deadline
_OF_CLIENT = """
allow_http allow_invalid_certificates connect_timeout default_headers http1_only http2_only pool_idle_timeout
pool_max_idle_per_host proxy_url timeout read_timeout http2_keep_alive_interval http2_keep_alive_timeout
http2_keep_alive_while_idle default_content_type randomize_addresses
proxy_ca_certificate proxy_excludes root_certificate user_agent
""".split()


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


def _refuse_bare(text: str) -> None:
    """Refuse a scheme alone: without what follows it, it would be looked for as a file."""
    match = _BARE.fullmatch(text)
    if match and ("/" in match[2] or match[1].lower() in SCHEMES):
        scheme = match[1].lower()
        place = {"hf": "org/name", "http": "host/folder", "https": "host/folder"}.get(scheme, "bucket/folder")
        cure = f"{scheme}://{place}" if scheme in SCHEMES else "a path, or an address such as s3://bucket/folder"
        # A path may have lost the slashes by now.
        raise UsageError(f"{match[1]}://: the address ends after its scheme; is a variable not set? Give {cure}")


def connect(addresses: Sequence[Parts], options: object, *, writes: bool = False) -> list[Address]:
    """A connection to the store of these addresses. Nothing is asked yet. The caller closes their ``store``.

    With ``writes`` the package itself tries requests again: what is written cannot go on where a try ended.

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
    cache = cache_of(ours.pop("cache_dir", None), ours.pop("cache_nbytes", None))
    service: Service
    if addresses[0].scheme == "hf":
        service = _hub(addresses[0], options)
    else:
        service = Obstore(_package_store(addresses[0], options, ours.get("deadline", 60.0) if writes else None))
    store = Store(service, addresses[0].shown, login=_LOGIN[addresses[0].scheme], **ours)
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


def _hub(parts: Parts, options: dict[str, Any]) -> Hub:
    of_hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}

    def open_store(base: str, headers: dict[str, str]) -> Any:
        given = {**headers, **options.get("default_headers", {})}
        scheme, _, host = base.partition("://")
        headed = {**options, "default_headers": given} if given else dict(options)
        return _package_store(Parts(scheme, host, ""), headed, None)

    if unknown := options.keys() - {*_OF_CLIENT}:
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


def _package_store(parts: Parts, options: dict[str, object], retries: float | None) -> Any:
    try:
        import obstore  # noqa: F401  # First: where it is not, the error names it.
        from obstore.store import HTTPStore, from_url
    except ModuleNotFoundError as error:
        if error.name != "obstore":
            raise
        raise MissingPackage("obstore", "cloud") from error
    client = {name: options.pop(name) for name in _OF_CLIENT if name in options}
    endpoints = [str(value) for name, value in options.items() if name.lower().endswith(_ENDPOINTS)]
    if parts.scheme == "http" or any(value.startswith("http://") for value in endpoints):
        client.setdefault("allow_http", True)  # It is written out.
    limits: dict[str, Any] = {"retry_config": {"max_retries": 0}}  # ``Store`` tries again, and counts.
    if retries is not None:
        # They end before the deadline: the last answer says more than that none came in time.
        pause = {"init_backoff": timedelta(seconds=0.05), "max_backoff": timedelta(seconds=max(0.1, retries / 10))}
        until = timedelta(seconds=0.7 * retries)
        limits = {"retry_config": {"max_retries": _RETRIES, "retry_timeout": until, "backoff": {**pause, "base": 2}}}
    if client:  # Else not: these replace all that variables such as AWS_ALLOW_HTTP say.
        limits["client_options"] = client
    url, problem = f"{parts.scheme}://{parts.host}", ""
    try:
        if parts.scheme.startswith("http"):
            if options:
                raise UsageError(f"{parts.shown}: store= has options that the web does not know: {', '.join(options)}")
            return HTTPStore(url, **limits)
        return from_url(url, config=options, **limits)
    except UsageError:
        raise
    except Exception as error:  # Its text may quote a secret.
        unknown = re.search(r"'(\w+)' is not", str(error)) if "Unknown" in type(error).__name__ else None
        problem = f"there is no option {unknown[1]!r}" if unknown else f"{type(error).__name__} by obstore"
        if "Account must be specified" in str(error):
            problem = 'its account is not known: set AZURE_STORAGE_ACCOUNT_NAME, or store={"account_name": name}'
    given = f"; store= has {', '.join(sorted([*options, *client]))}" if options or client else ""
    raise UsageError(f"{parts.shown}: this store cannot be used: {problem}{given}")


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


def within(
    store: object, paths: Iterable[str], options: Mapping[str, object] | None = None, *, writes: bool = False
) -> list[Address]:
    """Places in a store of the caller's, which stays open. The caller closes their ``store``.

    Raises:
        UsageError: it is to be written to, and is a file system.
    """
    if not _of(store, "obstore"):
        if writes:
            raise UsageError("file systems of fsspec are only read; save to a directory, and upload that")
        protocol = getattr(store, "protocol", "")
        name = protocol if isinstance(protocol, str) else protocol[0]
        mine = Store(Filesystem(store), f"{name}:/")
    else:
        mine = Store(Obstore(store), type(store).__name__)
    mine.cache = cache_of((options or {}).get("cache_dir"), None)
    return [Address(mine, path.strip("/")) for path in paths]


def _of(store: object, package: str) -> bool:
    return any(kind.__module__.partition(".")[0] == package for kind in type(store).__mro__)
