"""Meeting: what a ``Sender`` with a group has beside it: on rank 0 the lead, on every other one its rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...errors import HotweightsError
from ..audience import Audience
from ..door import Endpoint
from .group_place import place_in
from .lead import Lead
from .meeting_place import places_of
from .rank import Rank


def ranks_in(group: Any, endpoints: Sequence[Endpoint], timeout: float, compares: bool) -> Lead | Rank:
    """The lead, which waits for nobody yet; or a rank, which has met all others.

    Raises:
        UsageError: ``group`` is none, or the ranks have no place to meet.
        TransferError: not all ranks came, or rank 0 cannot lead.
    """
    place = place_in(group)
    meeting = places_of(endpoints, place.size)
    return Rank(group, place, meeting, timeout) if place.rank else Lead(group, place, meeting, timeout, compares)


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
        lead.meet(audience)
        audience.slots.seal()
    except BaseException:
        audience.close()
        lead.close()
        raise
    return audience
