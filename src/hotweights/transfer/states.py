"""States of the connection between a sender and one receiver, as a table that both sides follow."""

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
        """The opposite side."""
        return Side.RECEIVER if self is Side.SENDER else Side.SENDER


class SessionState(enum.Enum):
    """The state of a connection, as one side sees it. The other side may be some messages ahead or behind."""

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
    """In ``state`` the side ``by`` may send a message of this kind; ``next`` is the state after it."""

    state: SessionState
    by: Side
    kind: str
    next: SessionState


_S, _R = Side.SENDER, Side.RECEIVER

# Rows that lead back to their own state let in messages that were under way when the other side had moved on.
TABLE: tuple[Row, ...] = (
    Row(SessionState.CONNECTED, _R, "hello", SessionState.GREETED),
    Row(SessionState.GREETED, _S, "welcome", SessionState.IDLE),
    Row(SessionState.IDLE, _R, "crew", SessionState.IDLE),
    Row(SessionState.IDLE, _R, "past", SessionState.IDLE),
    Row(SessionState.IDLE, _S, "verdict", SessionState.IDLE),
    Row(SessionState.IDLE, _S, "offer", SessionState.OFFERED),
    Row(SessionState.OFFERED, _R, "crew", SessionState.OFFERED),
    Row(SessionState.OFFERED, _R, "past", SessionState.OFFERED),
    Row(SessionState.OFFERED, _R, "accept", SessionState.STREAMING),
    Row(SessionState.OFFERED, _R, "refuse", SessionState.REFUSED),
    Row(SessionState.OFFERED, _S, "abort", SessionState.ABORTED),
    Row(SessionState.STREAMING, _S, "filled", SessionState.STREAMING),
    Row(SessionState.STREAMING, _R, "release", SessionState.STREAMING),
    Row(SessionState.STREAMING, _S, "end", SessionState.ENDED),
    Row(SessionState.STREAMING, _R, "refuse", SessionState.REFUSED),
    Row(SessionState.STREAMING, _S, "abort", SessionState.ABORTED),
    Row(SessionState.ENDED, _R, "release", SessionState.ENDED),
    Row(SessionState.ENDED, _R, "prepared", SessionState.PREPARED),
    Row(SessionState.ENDED, _R, "refuse", SessionState.REFUSED),
    Row(SessionState.ENDED, _S, "abort", SessionState.ABORTED),
    Row(SessionState.PREPARED, _S, "commit", SessionState.COMMITTED),
    Row(SessionState.PREPARED, _S, "abort", SessionState.ABORTED),
    Row(SessionState.REFUSED, _S, "filled", SessionState.REFUSED),
    Row(SessionState.REFUSED, _S, "end", SessionState.REFUSED),
    Row(SessionState.REFUSED, _S, "abort", SessionState.ABORTED),
    Row(SessionState.ABORTED, _R, "crew", SessionState.ABORTED),
    Row(SessionState.ABORTED, _R, "past", SessionState.ABORTED),
    Row(SessionState.ABORTED, _R, "accept", SessionState.ABORTED),
    Row(SessionState.ABORTED, _R, "release", SessionState.ABORTED),
    Row(SessionState.ABORTED, _R, "prepared", SessionState.ABORTED),
    Row(SessionState.ABORTED, _R, "refuse", SessionState.ABORTED),
    Row(SessionState.ABORTED, _R, "done", SessionState.IDLE),
    Row(SessionState.COMMITTED, _R, "crew", SessionState.COMMITTED),
    Row(SessionState.COMMITTED, _R, "done", SessionState.IDLE),
)

_BETWEEN = frozenset({"crew", "past", "verdict"})  # They belong to no update that runs.

_COMING = {
    (state, side): frozenset(row.kind for row in TABLE if row.state is state and row.by is side)
    for state in SessionState
    for side in Side
}
_NEXT = {(row.state, row.by, row.kind): row.next for row in TABLE}


class Session:
    """One side's view of a connection: its state, and which update runs.

    Attributes:
        side: which side this is.
        state: changes with each message that is sent or comes.
        update: the id of the running update, or of the last one.
    """

    def __init__(self, side: Side) -> None:
        self.side = side
        self.state = SessionState.CONNECTED
        self.update = 0

    def may_come(self) -> frozenset[str]:
        """The kinds of messages that the other side may say now."""
        return _COMING[self.state, self.side.other]

    def sent(self, kind: str, update: int) -> None:
        """This side sends a message.

        Raises:
            ProtocolError: as ``came``.
        """
        self._step(kind, self.side, update)

    def came(self, kind: str, update: int) -> None:
        """A message of the other side came.

        Raises:
            ProtocolError: it may not come in this state, or is of another update. The state is as it was.
        """
        self._step(kind, self.side.other, update)

    def _step(self, kind: str, by: Side, update: int) -> None:
        following = _NEXT.get((self.state, by, kind))
        if following is None:
            raise ProtocolError(f"the {by.value} may not say {kind!r} when the state is {self.state.value!r}")
        if kind in _BETWEEN:
            return
        if kind == "offer" and update <= self.update:
            raise ProtocolError(f"the offer of update {update} is stale; update {self.update} came before it")
        if kind != "offer" and update != self.update:
            raise ProtocolError(f"{kind!r} of update {update} is stale; update {self.update} runs")
        self.state, self.update = following, update
