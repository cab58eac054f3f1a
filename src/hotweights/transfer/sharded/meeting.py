"""Meeting: what a ``Sender`` with a group has beside it: on rank 0 the lead, on every other one its rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...errors import HotweightsError, UsageError
from ..address import path_of
from ..audience import Audience
from ..endpoint import is_local, plain
from .group_place import place_in
from .lead import Lead
from .rank import Rank


def ranks_in(group: Any, address: str | Sequence[str], timeout: float) -> Lead | Rank:
    """The lead, which waits for nobody yet; or a rank, which has met all others.

    Raises:
        UsageError: ``group`` is none, or the ranks have no place to meet.
        TransferError: not all ranks came, or rank 0 cannot lead.
    """
    place = place_in(group)
    addresses = [address] if isinstance(address, str) else list(address)
    paths = [path_of(plain(address)) for address in addresses if is_local(address)]
    if not paths:
        more = ", ".join(map(repr, ("unix:run/hw", *addresses)))
        raise UsageError(
            f"the ranks of group= meet at a unix: address, all on one host; give one too: Sender([{more}], group=...)"
        )
    return Rank(group, place, paths[0], timeout) if place.rank else Lead(group, place, paths[0], timeout)


def met(lead: Lead, listening: Callable[..., Audience]) -> Audience:
    """The lead's receivers, when all ranks are there and have mapped the slots; ``listening`` listens for them.

    Raises:
        TransferTimeout: not all ranks came.
        HotweightsError: nobody can listen. The ranks are told so.
    """
    try:
        audience = listening(beside=lead)
    except BaseException as error:
        if isinstance(error, HotweightsError):
            lead.refuse(error)
        lead.close()
        raise
    try:
        lead.meet(audience.slots)
        audience.slots.seal()
    except BaseException:
        audience.close()
        lead.close()
        raise
    return audience
