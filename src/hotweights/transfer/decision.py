"""Decision: what becomes of an update, as functions of what somebody knows of it. Nothing is sent or read here.

Senders, relays, receivers and ``hotweights resolve`` all call these. A test runs them through every order of messages,
deaths and cut links for up to four hosts.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Mapping


class Decision(enum.Enum):
    """What becomes of an update."""

    COMMIT = 1
    ABORT = 2


class Vote(enum.Enum):
    """What a lead knows of a member before it decides."""

    OPEN = "open"
    PREPARED = "prepared"
    LOST = "lost"  # or it has refused


class Known(enum.Enum):
    """What a member knows of an update, and tells the next lead."""

    COMMITTED = "committed"  # it has taken it
    KEPT = "kept"  # it heard or decided that it is not taken, or never voted
    IN_DOUBT = "in doubt"  # it has voted, and does not know


def of_lead(votes: Iterable[Vote], *, drop: bool) -> Decision | None:
    """What the lead decides; ``None`` while it waits. With ``drop`` the decision is about those that are prepared."""
    counts = Counter(votes)
    if counts[Vote.LOST] and not drop:
        return Decision.ABORT
    if counts[Vote.OPEN]:
        return None
    return Decision.COMMIT if counts[Vote.PREPARED] else Decision.ABORT


def of_member(*, voted: bool, heard: Decision | None = None, record: Decision | None = None) -> Decision | None:
    """What a member does that has lost its lead; ``None`` if it is in doubt.

    Args:
        voted: whether it has said that it is prepared. Before that the lead cannot have decided to commit.
        heard: what the lead said last.
        record: what is written about this member, by whoever was first; ``None`` if that cannot be read.
    """
    if heard is not None or record is not None:
        return heard or record
    return None if voted else Decision.ABORT


def of_next_lead(members: Mapping[int, int], told: Iterable[tuple[int, Known]]) -> Decision | None:
    """What the next lead says to members in doubt; ``None`` while it waits for others.

    Whoever speaks here hears the lead before no more. So if nobody has committed, and all have spoken, nobody will.

    Args:
        members: of the update, by place; and of how many processes each consists.
        told: what each process has said that came back, and the place of its member.
    """
    listed = list(told)
    if any(outcome is Known.COMMITTED for _, outcome in listed):
        return Decision.COMMIT
    counts = Counter(place for place, _ in listed)
    is_back = members and all(counts[place] >= size for place, size in members.items())
    return Decision.ABORT if is_back else None
