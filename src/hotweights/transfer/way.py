"""Way: how the versions of one sender reach those who want them: published, to an audience, or by ranks together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from ..errors import UsageError
from ..sources.objects.run import is_run
from .audience import Audience
from .carriers.table import DEFAULT, ENCRYPTED, carrier_of
from .endpoint import any_remote, endpoints_of
from .publication import Publication, check_none_connects
from .registers.table import register_of
from .sharded.lead import Lead
from .sharded.meeting import met, ranks_in
from .sharded.rank import Rank

OnLost = Literal["abort", "drop"]
"""When a receiver is lost during an update: nobody takes the version, or all others do."""

Encrypt = Literal["control", "all"]
"""What is encrypted between hosts: all but the weights, or the weights too."""

_SLOT = 4 * 1024 * 1024
_SLOT_BETWEEN_HOSTS = 16 * 1024 * 1024  # What each slot costs, in words and in waits, is more there.

Way = Publication | Audience | Rank


def way_of(
    address: str | os.PathLike[str] | Sequence[str],
    *,
    receivers: int,
    slots: int,
    slot_nbytes: int | None,
    digests: bool,
    timeout: float,
    on_lost: OnLost,
    keys: str | os.PathLike[str] | None,
    insecure: bool,
    decision: str | None,
    carrier: str,
    encrypt: Encrypt,
    keep: int | None,
    store: object,
    group: Any,
    compare_copies: bool,
) -> tuple[Way, Lead | Rank | None]:
    """The way by these options of ``Sender``, and what ranks with ``group`` have. Close both.

    Raises:
        UsageError: some of them do not belong together.
        HotweightsError: as ``Sender``.
    """
    if is_run(address, store):
        check_none_connects(
            address,
            receivers=(receivers, 1),
            slots=(slots, 4),
            slot_nbytes=(slot_nbytes, None),
            digests=(digests, True),
            on_lost=(on_lost, "abort"),
            keys=(keys, None),
            insecure=(insecure, False),
            decision=(decision, None),
            carrier=(carrier, DEFAULT),
            encrypt=(encrypt, "control"),
            group=(group, None),
        )
        return Publication(address, keep=keep, store=store, timeout=timeout), None  # type: ignore[arg-type]
    if keep is not None:
        raise UsageError(f"keep= is for places where versions are published; {address!r} is none; leave it out")
    register = None if decision is None else register_of(decision)
    if register is not None:
        register.probe()
    carrier_of(carrier)  # What is not installed is said before anything is held.
    if carrier != DEFAULT and not any_remote(address):
        raise UsageError(f"carrier= is for receivers on other hosts, and {address!r} is on this one; leave it out")
    if encrypt == "all":
        _check_encrypted(address, carrier, group)
        carrier = ENCRYPTED
    if slot_nbytes is None:
        slot_nbytes = _SLOT_BETWEEN_HOSTS if any_remote(address) else _SLOT
    endpoints = endpoints_of(address, keys=keys, insecure=insecure)  # type: ignore[arg-type]
    audience = partial(
        Audience,
        endpoints,
        slots=slots,
        slot_nbytes=slot_nbytes,
        receivers=receivers,
        timeout=timeout,
        digests=digests,
        drop=on_lost == "drop",
        carrier=carrier,
        register=register,
    )
    if group is None:
        return audience(), None
    ranks = ranks_in(group, endpoints, timeout, compare_copies)
    return (ranks, ranks) if isinstance(ranks, Rank) else (met(ranks, audience), ranks)  # Receivers come to rank 0.


def _check_encrypted(address: Any, carrier: str, group: Any) -> None:
    """Raise ``UsageError`` where something would go unencrypted all the same."""
    if carrier != DEFAULT:
        raise UsageError(f"encrypt='all' is for carrier='{DEFAULT}': what {carrier!r} brings is not encrypted")
    if group is not None:
        raise UsageError(
            "encrypt='all' is not for group=: what ranks send to one another is not encrypted; leave it out"
        )
    if not any_remote(address):
        raise UsageError(f"encrypt='all' is for receivers on other hosts, and {address!r} is on this one; leave it out")
