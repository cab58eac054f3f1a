"""The table of addresses: which endpoint stands behind which scheme."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from ..errors import UsageError
from .address import UnixEndpoint
from .door import Endpoint
from .env_address import ENV, named
from .network import NetworkEndpoint, check_port, check_target
from .ray.endpoint import RayEndpoint


def _named(address: str, keys: str | os.PathLike[str] | None, insecure: bool) -> Endpoint:
    """The endpoint of what the environment says. Keys that are given go before those that it names."""
    found = named(address)
    if keys is None and not is_local(found.address):
        keys = found.keys
    try:
        return endpoint_of(found.address, keys=keys, insecure=insecure)
    except UsageError as error:
        more = "" if keys is not None or is_local(found.address) else ". HOTWEIGHTS_KEYS=DIR names them, too"
        raise UsageError(f"{address} is {found.address}, by {found.variable}: {error}{more}") from error


SCHEMES: Mapping[str, Callable[[str, str | os.PathLike[str] | None, bool], Endpoint]] = {
    "unix": UnixEndpoint,
    "tcps": NetworkEndpoint,
    "ray": RayEndpoint,
    "env": _named,
}
"""What an address may begin with, and what is made of it, keys, and whether to go without."""


def endpoint_of(address: str, *, keys: str | os.PathLike[str] | None = None, insecure: bool = False) -> Endpoint:
    """The endpoint of an address.

    Raises:
        UsageError: it is no address, or the keys do not fit it.
    """
    scheme = address.partition(":")[0] if isinstance(address, str) else ""
    if scheme not in SCHEMES:
        bare = isinstance(address, str) and address.startswith(("/", "./", "../"))
        meant = f". If the path of a socket is meant: unix:{address}" if bare else ""
        meant = f". Is tcps:{address.partition(':')[2]} meant?" if scheme in ("tcp", "tls", "http", "https") else meant
        raise UsageError(
            "an address looks like unix:/tmp/trainer/socket, tcps://trainer:7600, ray:job or env:; "
            f"this is {address!r}{meant}"
        )
    return SCHEMES[scheme](address, keys, insecure)


def origin_of(address: str, *, keys: str | os.PathLike[str] | None = None, insecure: bool = False) -> Endpoint:
    """The endpoint of an address for a relay: it leads to the sender itself, past any relay on this host.

    Raises:
        UsageError: as ``endpoint_of``.
    """
    if isinstance(address, str) and plain(address).startswith("ray:"):
        return RayEndpoint(plain(address), keys, insecure, direct=True)
    return endpoint_of(address, keys=keys, insecure=insecure)


def endpoints_of(
    addresses: str | Sequence[str], *, keys: str | os.PathLike[str] | None = None, insecure: bool = False
) -> list[Endpoint]:
    """The endpoints of one address or several. Of several, keys are for those on the network, if there are any.

    Raises:
        UsageError: as ``endpoint_of``, or there is no address.
    """
    listed = [addresses] if isinstance(addresses, str) or not isinstance(addresses, Sequence) else list(addresses)
    if not listed:
        raise UsageError("a sender has an address at least; found none")
    if len(listed) == 1:
        return [endpoint_of(listed[0], keys=keys, insecure=insecure)]
    return [
        endpoint_of(address) if is_local(address) else endpoint_of(address, keys=keys, insecure=insecure)
        for address in listed
    ]


def any_remote(addresses: object) -> bool:
    """Whether one of these can be on other hosts."""
    listed = addresses if isinstance(addresses, Sequence) and not isinstance(addresses, str) else [addresses]
    return not all(map(is_local, listed))


def settled(address: str, keys: str | os.PathLike[str] | None = None) -> tuple[str, str | os.PathLike[str] | None]:
    """The address itself and its keys; for ``env:`` those that the environment says. Given keys go before.

    Raises:
        UsageError: the environment does not say it.
    """
    if not isinstance(address, str) or not address.startswith(ENV):
        return address, keys
    found = named(address)
    return found.address, found.keys if keys is None and not is_local(found.address) else keys


def plain(address: str) -> str:
    """The address itself; for ``env:`` the one that the environment says.

    Raises:
        UsageError: the environment does not say it.
    """
    return named(address).address if isinstance(address, str) and address.startswith(ENV) else address


def check_connectable(address: str) -> None:
    """See that receivers can connect to an address as it is written; it need not be one at all.

    Raises:
        UsageError: it is on the network, and has no port that is known, or no host; or as ``plain``.
    """
    if isinstance(address, str) and (where := plain(address)).startswith("tcps:"):
        check_target(where)


def check_known(addresses: str | Sequence[str]) -> None:
    """See that others can know where to connect before anybody listens there; these need not be addresses at all.

    Raises:
        UsageError: a port is 0; or as ``plain``.
    """
    for address in [addresses] if isinstance(addresses, str) else addresses:
        if isinstance(address, str) and (where := plain(address)).startswith("tcps:"):
            check_port(where)


def is_local(address: object) -> bool:
    """Whether only this host has such an address.

    Raises:
        UsageError: as ``plain``.
    """
    return isinstance(address, str) and plain(address).startswith("unix:")
