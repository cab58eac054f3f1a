"""The table of carriers: how bytes get from one host to another, by the name that ``Sender(carrier=)`` says."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...errors import UsageError
from ..flow import Carrier


def _sockets() -> Carrier:
    from .sockets import CARRIER

    return CARRIER


def _process_group() -> Carrier:
    import torch.distributed

    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        raise UsageError(
            "carrier='pg' needs a torch with gloo, and this one has none; leave carrier= out at the sender"
        )
    from .process_group import CARRIER

    return CARRIER


def _nixl() -> Carrier:
    from .nixl import CARRIER

    return CARRIER


def _tls() -> Carrier:
    from .tls import CARRIER

    return CARRIER


CARRIERS: Mapping[str, Callable[[], Carrier]] = {"sockets": _sockets, "pg": _process_group, "nixl": _nixl}
"""What there is. Calling one imports what it needs."""

DEFAULT = "sockets"

ENCRYPTED = "tls"
"""What ``Sender(encrypt="all")`` means to receivers: the default one, encrypted."""

TOLD = {**CARRIERS, ENCRYPTED: _tls}
"""What a sender may tell a receiver."""


def carrier_of(name: str) -> Carrier:
    """The carrier of a name.

    Raises:
        UsageError: there is none.
        MissingPackage: it needs a package that is not installed; the message says what to type.
    """
    if not isinstance(name, str) or name not in CARRIERS:
        known = ", ".join(map(repr, CARRIERS))
        raise UsageError(f"carrier= says how bytes travel between hosts, and is one of {known}; found {name!r}")
    return CARRIERS[name]()


def carrier_told(name: str) -> Carrier | None:
    """The carrier that a sender tells of; ``None`` if there is none of that name here.

    Raises:
        UsageError, MissingPackage: as ``carrier_of``.
    """
    return TOLD[name]() if name in TOLD else None
