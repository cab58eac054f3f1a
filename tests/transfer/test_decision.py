"""The rule of the decision, in every order of messages, deaths and cut links: nobody aborts what another commits."""

import functools
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from hotweights.transfer import decision
from hotweights.transfer.decision import Decision, Known, Vote

COMMIT, ABORT = Decision.COMMIT, Decision.ABORT


class Rules(NamedTuple):
    """What senders, relays and receivers call; tests break it."""

    of_lead: Callable = decision.of_lead
    of_member: Callable = decision.of_member
    of_next_lead: Callable = decision.of_next_lead
    leaves_before_it_asks: bool = True  # a member that asks the next lead hears the one before no more
    record_first: bool = True  # the lead writes the record before it tells anybody


class Host(NamedTuple):
    """A member: what it is, what is on its way to it and from it, and what two leads know of it."""

    status: str = "working"  # prepared, committed, aborted, doubt, late, behind, dead
    linked: bool = True  # to the first lead
    up: Vote | None = None
    down: Decision | None = None
    vote: Vote = Vote.OPEN  # as the lead knows it
    listed: bool = False  # the decision to commit is about it
    told: Known | None = None  # to the next lead
    verdict: Decision | None = None


class World(NamedTuple):
    hosts: tuple[Host, ...]
    lead: str = "open"  # decided, dead
    decided: Decision | None = None
    record: Decision | None = None
    told_all: bool = False  # the lead has sent its decision


DONE = {"committed": Known.COMMITTED, "aborted": Known.KEPT, "doubt": Known.IN_DOUBT, "late": Known.IN_DOUBT}


@functools.cache
def order(host):
    return repr(host)


def moved(world, number, **changes):
    hosts = list(world.hosts)
    hosts[number] = hosts[number]._replace(**changes)
    return world._replace(hosts=tuple(sorted(hosts, key=order)))  # Hosts are alike: one order stands for all.


def by(result, without="doubt"):
    return {COMMIT: "committed", ABORT: "aborted", None: without}[result]


def steps(world, rules, drop, register):
    yield from lead_steps(world, rules, drop, register)
    seen = set()
    for number, host in enumerate(world.hosts):
        if host in seen:
            continue
        seen.add(host)
        yield from host_steps(world, number, host, rules, register)
    yield from next_lead_steps(world, rules, register)


def lead_steps(world, rules, drop, register):
    if world.lead == "dead":
        return
    yield world._replace(lead="dead")
    if world.lead == "open":
        decided = rules.of_lead([host.vote for host in world.hosts], drop=drop)
        if decided is not None:
            listed = tuple(
                host._replace(listed=decided is COMMIT and host.vote is Vote.PREPARED) for host in world.hosts
            )
            there = world._replace(hosts=listed, lead="decided", decided=decided)
            # Also an abort is written: else a member that cannot reach this lead might find nothing.
            yield there if not (register and rules.record_first) else written(there, decided)
    if world.lead == "decided" and not world.told_all:
        hosts = []
        for host in world.hosts:
            said = COMMIT if world.decided is COMMIT and host.listed else ABORT
            hosts.append(host._replace(down=said) if host.linked else host)
        yield world._replace(hosts=tuple(sorted(hosts, key=order)), told_all=True)
    if world.lead == "decided" and register and world.record is None:
        yield written(world, world.decided)


def written(world, wanted):
    """The record, of whoever was first; the lead does what is written."""
    record = world.record or wanted
    if record is not wanted:
        hosts = tuple(host._replace(listed=False) for host in world.hosts)
        return world._replace(record=record, decided=record, hosts=hosts)
    return world._replace(record=record)


def host_steps(world, number, host, rules, register):
    if host.up is not None:  # What was said arrives, or is lost with the link.
        known = host.up if host.vote is Vote.OPEN and world.lead == "open" else host.vote
        yield moved(world, number, up=None, vote=known)
    if host.linked:
        lost = Vote.LOST if world.lead == "open" else host.vote
        yield from without_link(world, number, host, rules, register, lost)
    if host.status == "dead":
        return
    yield moved(world, number, status="dead", down=None, verdict=None, told=None)
    if host.status == "working":
        yield moved(world, number, status="prepared", up=Vote.PREPARED)
        yield moved(world, number, status="aborted", up=Vote.LOST)
    if host.down is not None:
        voted = host.status == "prepared"
        heard = by(rules.of_member(voted=voted, heard=host.down)) if host.status in ("working", "prepared") else None
        if heard is None and host.status in ("doubt", "late") and not rules.leaves_before_it_asks:
            heard = by(host.down)
        yield moved(world, number, status=heard or host.status, down=None)
    if host.status == "doubt":
        yield moved(world, number, status="late")  # It waited long enough, and keeps nothing of the version.
    if host.status == "doubt" and register:
        yield reading(world, number, host, rules)


def without_link(world, number, host, rules, register, vote):
    """The link is cut, or the process at its other end is gone: both sides notice."""
    down = host.down if not rules.leaves_before_it_asks else None
    cut = moved_vote = {"linked": False, "up": None, "down": down, "vote": vote}
    if host.status not in ("working", "prepared"):
        yield moved(world, number, **cut)
        return
    voted = host.status == "prepared"
    yield moved(world, number, **moved_vote, status=by(rules.of_member(voted=voted)))
    if register and voted:
        there = world._replace(hosts=(*world.hosts[:number], host._replace(**cut), *world.hosts[number + 1 :]))
        yield reading(there, number, there.hosts[number], rules)


def reading(world, number, host, rules):
    """The record is in reach: it says what is written, and if nothing is, that nobody takes the version."""
    record = world.record or ABORT
    own = COMMIT if record is COMMIT and host.listed else ABORT
    return moved(world._replace(record=record), number, status=by(rules.of_member(voted=True, record=own)))


def next_lead_steps(world, rules, register):
    told = [(number, host.told) for number, host in enumerate(world.hosts) if host.told is not None]
    if told:  # It dies: what it had said may come still, and another one asks again.
        yield world._replace(hosts=tuple(sorted((host._replace(told=None) for host in world.hosts), key=order)))
    result = None if register else rules.of_next_lead(dict.fromkeys(range(len(world.hosts)), 1), told)
    for number, host in enumerate(world.hosts):
        if host.status in DONE and not host.linked and host.told is None:
            yield moved(world, number, told=DONE[host.status], verdict=None)
        if host.told is Known.IN_DOUBT and result is not None and host.status in ("doubt", "late"):
            yield moved(world, number, verdict=result, told=None)
        if host.verdict is not None and host.status in ("doubt", "late"):
            taken = by(host.verdict)
            late = host.status == "late" and host.verdict is COMMIT  # It has no bytes any more, and is named.
            yield moved(world, number, status="behind" if late else taken, verdict=None)


def explore(count, rules=None, *, drop=False, register=False, limit=None):
    """Every world that can be reached; stops at the first that is torn. Returns how many, and that one."""
    start = World((Host(),) * count)
    seen, waiting = {start}, deque([start])
    while waiting:
        world = waiting.popleft()
        if torn(world, drop):
            return len(seen), world
        for there in steps(world, rules or Rules(), drop, register):
            if there not in seen:
                seen.add(there)
                waiting.append(there)
        if limit is not None and len(seen) > limit:
            break
    return len(seen), None


def torn(world, drop):
    """Somebody has taken the version, and another one, whom the decision was about, decided that nobody does."""
    committed = any(host.status == "committed" for host in world.hosts)
    return committed and any(host.status == "aborted" and (host.listed or not drop) for host in world.hosts)


CASES = [(drop, register) for drop in (False, True) for register in (False, True)]


@pytest.mark.parametrize(("drop", "register"), CASES)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("count", [1, 2, *(pytest.param(count, marks=pytest.mark.long) for count in (3, 4))])
def test_no_order_of_messages_deaths_and_cuts_tears_a_group(count, drop, register):
    worlds, found = explore(count, drop=drop, register=register)
    assert found is None
    assert worlds > {1: 20, 2: 300, 3: 3000, 4: 20000}[count]


def drops_who_is_away(members, told):
    return COMMIT if any(outcome is Known.COMMITTED for _, outcome in told) else ABORT


def majority(votes, *, drop):
    votes = list(votes)
    return COMMIT if votes.count(Vote.PREPARED) * 2 > len(votes) else None


def aborts_after_its_vote(*, voted, heard=None, record=None):
    return heard or record or ABORT


def commits_after_its_vote(*, voted, heard=None, record=None):
    return heard or record or (COMMIT if voted else ABORT)


BROKEN = {
    "the next lead drops who is away": (Rules(of_next_lead=drops_who_is_away), False),
    "the next lead commits what all are in doubt about": (
        Rules(of_next_lead=lambda members, told: COMMIT if len(list(told)) == len(members) else None),
        False,
    ),
    "a majority is enough": (Rules(of_lead=majority), False),
    "a member takes back its vote": (Rules(of_member=aborts_after_its_vote), False),
    "a member takes what it has voted for": (Rules(of_member=commits_after_its_vote), False),
    "who asks the next lead still hears the one before": (Rules(leaves_before_it_asks=False), False),
    "the lead tells before it has written": (Rules(record_first=False), True),
    "a member does not heed the record": (
        Rules(of_member=lambda *, voted, heard=None, record=None: heard or (ABORT if record else None)),
        True,
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_rule_is_found(broken):
    rules, register = BROKEN[broken]
    assert any(explore(count, rules, register=register)[1] is not None for count in (2, 3))


@examples(200)
@given(st.data(), st.booleans(), st.booleans())
def test_four_hosts_in_random_orders(data, drop, register):
    world = World((Host(),) * 4)
    for _ in range(60):
        following = list(dict.fromkeys(steps(world, Rules(), drop, register)))
        if not following:
            break
        world = following[data.draw(st.integers(0, len(following) - 1))]
        assert not torn(world, drop), world


def test_when_all_are_back_nobody_is_in_doubt():
    """Whatever each of them knows, and also where a member is several processes."""
    assert decision.of_next_lead({}, [(1, Known.IN_DOUBT)]) is None  # Who the others are was not said.
    members = {1: 1, 2: 2}
    for first in Known:
        for second in Known:
            told = [(1, first), (2, second), (2, second)]
            result = decision.of_next_lead(members, told)
            assert result is (COMMIT if Known.COMMITTED in (first, second) else ABORT)
            if second is not Known.COMMITTED and first is not Known.COMMITTED:
                assert decision.of_next_lead(members, told[:2]) is None


@pytest.mark.parametrize("drop", [False, True])
def test_a_lead_waits_while_somebody_may_still_prepare(drop):
    assert decision.of_lead([Vote.PREPARED, Vote.OPEN], drop=drop) is None
    assert decision.of_lead([Vote.PREPARED, Vote.PREPARED], drop=drop) is COMMIT
    assert decision.of_lead([Vote.LOST, Vote.OPEN], drop=drop) is (None if drop else ABORT)
    assert decision.of_lead([Vote.LOST, Vote.PREPARED], drop=drop) is (COMMIT if drop else ABORT)
    assert decision.of_lead([Vote.LOST], drop=drop) is ABORT
