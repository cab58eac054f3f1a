"""The table of states is walked: both sides, with what is under way between them, in every order."""

from collections import deque
from pathlib import Path

import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

import hotweights as hw
from hotweights.transfer.messages import KINDS
from hotweights.transfer.states import TABLE, Session, SessionState, Side

UNDER_WAY = 3  # messages on the way in each direction


def following(state, side, kind):
    return next((row.next for row in TABLE if (row.state, row.by, row.kind) == (state, side, kind)), None)


def moves(sender, receiver, down, up):
    """What can happen next: a side says something, or takes what came first."""
    for row in TABLE:
        if row.state in LATE.get(row.kind, ()):
            continue
        if row.by is Side.SENDER and row.state is sender and len(down) < UNDER_WAY:
            yield row.next, receiver, (*down, row.kind), up
        if row.by is Side.RECEIVER and row.state is receiver and len(up) < UNDER_WAY:
            yield sender, row.next, down, (*up, row.kind)
    if down:
        state = following(receiver, Side.SENDER, down[0])
        assert state is not None, f"{down[0]!r} comes, and the receiver is {receiver.value}; the sender {sender.value}"
        yield sender, state, down[1:], up
    if up:
        state = following(sender, Side.RECEIVER, up[0])
        assert state is not None, f"{up[0]!r} comes, and the sender is {sender.value}; the receiver {receiver.value}"
        yield state, receiver, down, up[1:]


# Rows for what was under way: in these states a side takes such a message, and does not say it any more.
LATE = {
    "filled": (SessionState.REFUSED,),
    "end": (SessionState.REFUSED,),
    "crew": (SessionState.OFFERED, SessionState.ABORTED),
    "past": (SessionState.OFFERED, SessionState.ABORTED),
    "accept": (SessionState.ABORTED,),
    "release": (SessionState.ABORTED,),
    "prepared": (SessionState.ABORTED,),
    "refuse": (SessionState.ABORTED,),
}


def reachable():
    start = (SessionState.CONNECTED, SessionState.CONNECTED, (), ())
    seen, waiting, steps = {start}, deque([start]), {}
    while waiting:
        here = waiting.popleft()
        steps[here] = list(moves(*here))
        for there in steps[here]:
            if there not in seen:
                seen.add(there)
                waiting.append(there)
    return steps


def test_whatever_crosses_whatever_nobody_is_surprised():
    """Every message that can come is one that the state takes; and from everywhere both come to rest together."""
    steps = reachable()
    assert len(steps) > 100
    rest = {here for here in steps if here[0] is here[1] is SessionState.IDLE and not here[2] and not here[3]}
    assert rest
    back = {here: set() for here in steps}
    for here, there in ((here, there) for here, all_there in steps.items() for there in all_there):
        back[there].add(here)
    reached, waiting = set(rest), deque(rest)
    while waiting:
        for before in back[waiting.popleft()] - reached:
            reached.add(before)
            waiting.append(before)
    assert reached == set(steps), "some states never end"


def test_nobody_commits_who_did_not_prepare():
    """A receiver is told to commit only when it said that it can; after that its answer comes,
    and how many a relay has."""
    commits = [row for row in TABLE if row.next is SessionState.COMMITTED is not row.state]
    assert [(row.state, row.kind) for row in commits] == [(SessionState.PREPARED, "commit")]
    assert {row.by for row in TABLE if row.next is SessionState.PREPARED} == {Side.RECEIVER}
    after = [(row.by, row.kind) for row in TABLE if row.state is SessionState.COMMITTED]
    assert after == [(Side.RECEIVER, "crew"), (Side.RECEIVER, "done")]


def test_the_table_is_a_function_of_known_words():
    keys = [(row.state, row.by, row.kind) for row in TABLE]
    assert len(set(keys)) == len(keys)
    assert {row.kind for row in TABLE} == set(KINDS) - {"broken"}
    assert {row.state for row in TABLE} == set(SessionState)


@examples(100)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from(KINDS), st.integers(0, 3)), max_size=20))
def test_a_session_follows_the_table_and_nothing_else(said):
    session = Session(Side.SENDER)
    for ours, kind, update in said:
        side = Side.SENDER if ours else Side.RECEIVER
        state, running = session.state, session.update
        expected = following(state, side, kind)
        between = kind in ("crew", "past", "verdict")  # of no update that runs
        stale = update <= running if kind == "offer" else update != running and not between
        step = session.sent if ours else session.came
        if expected is None or stale:
            with pytest.raises(hw.ProtocolError, match=f"{kind}|stale"):
                step(kind, update)
            assert (session.state, session.update) == (state, running)
        else:
            step(kind, update)
            assert (session.state, session.update) == (expected, running if between else update)


def test_a_message_of_an_earlier_update_is_refused():
    session = Session(Side.SENDER)
    for kind, ours in (("hello", False), ("welcome", True)):
        session.sent(kind, 0) if ours else session.came(kind, 0)
    session.sent("offer", 7)
    with pytest.raises(hw.ProtocolError, match="of update 6 is stale; update 7 runs"):
        session.came("accept", 6)


def drawing() -> str:
    """The table as text, for people."""
    width = max(len(row.state.value) for row in TABLE)
    lines = []
    for state in SessionState:
        for row in (row for row in TABLE if row.state is state):
            arrow = f"── {row.by.value}: {row.kind} ".ljust(22, "─")
            lines.append(f"{row.state.value:>{width}} {arrow}▶ {row.next.value}")
        lines.append("")
    return "\n".join(lines).rstrip()


def test_the_drawing_names_every_row():
    assert len([line for line in drawing().splitlines() if line]) == len(TABLE)


def test_the_docs_draw_the_table():
    page = Path(__file__).parents[2] / "docs" / "transfer.md"
    assert drawing() in page.read_text()
