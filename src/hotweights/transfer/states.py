"""The states of one sender and one receiver, as a table. Both sides follow it; nothing is sent or waited for here."""

from __future__ import annotations

import enum
from typing import NamedTuple

from ..errors import ProtocolError


class Side(enum.Enum):
    """Who says something."""

    SENDER = "sender"
    RECEIVER = "receiver"

    @property
    def other(self) -> Side:
        """The one on the other end."""
        return Side.RECEIVER if self is Side.SENDER else Side.SENDER


class State(enum.Enum):
    """Where two sides stand, as one of them sees it. The other may be a message ahead or behind."""

    CONNECTED = "connected"
    GREETED = "greeted"
    IDLE = "idle"
    OFFERED = "offered"
    STREAMING = "streaming"
    ENDED = "ended"
    PREPARED = "prepared"
    REFUSED = "refused"
    COMMITTED = "committed"
    ABORTED = "aborted"


class Row(NamedTuple):
    """In this state this side may say this; then the state is the next."""

    state: State
    by: Side
    kind: str
    next: State


_S, _R = Side.SENDER, Side.RECEIVER

# A row that leads back to its own state takes what was under way when the other side had moved on already.
TABLE: tuple[Row, ...] = (
    Row(State.CONNECTED, _R, "hello", State.GREETED),
    Row(State.GREETED, _S, "welcome", State.IDLE),
    Row(State.IDLE, _S, "offer", State.OFFERED),
    Row(State.OFFERED, _R, "accept", State.STREAMING),
    Row(State.OFFERED, _R, "refuse", State.REFUSED),
    Row(State.OFFERED, _S, "abort", State.ABORTED),
    Row(State.STREAMING, _S, "filled", State.STREAMING),
    Row(State.STREAMING, _R, "release", State.STREAMING),
    Row(State.STREAMING, _S, "end", State.ENDED),
    Row(State.STREAMING, _R, "refuse", State.REFUSED),
    Row(State.STREAMING, _S, "abort", State.ABORTED),
    Row(State.ENDED, _R, "release", State.ENDED),
    Row(State.ENDED, _R, "prepared", State.PREPARED),
    Row(State.ENDED, _R, "refuse", State.REFUSED),
    Row(State.ENDED, _S, "abort", State.ABORTED),
    Row(State.PREPARED, _S, "commit", State.COMMITTED),
    Row(State.PREPARED, _S, "abort", State.ABORTED),
    Row(State.REFUSED, _S, "filled", State.REFUSED),
    Row(State.REFUSED, _S, "end", State.REFUSED),
    Row(State.REFUSED, _S, "abort", State.ABORTED),
    Row(State.ABORTED, _R, "accept", State.ABORTED),
    Row(State.ABORTED, _R, "release", State.ABORTED),
    Row(State.ABORTED, _R, "prepared", State.ABORTED),
    Row(State.ABORTED, _R, "refuse", State.ABORTED),
    Row(State.ABORTED, _R, "done", State.IDLE),
    Row(State.COMMITTED, _R, "done", State.IDLE),
)

_NEXT = {(row.state, row.by, row.kind): row.next for row in TABLE}


class Session:
    """One side's view of a connection: its state, and which update runs.

    Attributes:
        side: which side this is.
        state: changes with each message that is sent or comes.
        update: the running update's id, or the last one's.
    """

    def __init__(self, side: Side) -> None:
        self.side = side
        self.state = State.CONNECTED
        self.update = 0

    def sent(self, kind: str, update: int) -> None:
        """This side says something."""
        self._step(kind, self.side, update)

    def came(self, kind: str, update: int) -> None:
        """The other side said something.

        Raises:
            ProtocolError: it may not say this now, or means another update; the state is as it was.
        """
        self._step(kind, self.side.other, update)

    def _step(self, kind: str, by: Side, update: int) -> None:
        following = _NEXT.get((self.state, by, kind))
        if following is None:
            raise ProtocolError(f"the {by.value} may not say {kind!r} when the state is {self.state.value!r}")
        if kind == "offer" and update <= self.update:
            raise ProtocolError(f"the offer of update {update} is stale; update {self.update} has been")
        if kind != "offer" and update != self.update:
            raise ProtocolError(f"{kind!r} of update {update} is stale; update {self.update} runs")
        self.state, self.update = following, update
