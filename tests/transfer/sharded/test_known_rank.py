"""What the lead of a sharded trainer hears of its ranks: of those that spoke, without asking all others."""

import os
import socket
import time

import pytest

from hotweights.transfer.sharded.group_place import GroupPlace
from hotweights.transfer.sharded.known_rank import KnownRank, RankWatch
from hotweights.transfer.sharded.lead import Lead
from hotweights.transfer.sharded.link import Link
from hotweights.transfer.sharded.words import Checked, Leave


class CountedLink(Link):
    reads = 0

    def read(self):
        CountedLink.reads += 1
        return super().read()


@pytest.fixture
def trainer():
    """A lead whose ranks are all there, and the other ends of its links."""
    lead = Lead(None, GroupPlace(0, tuple(range(9))), [], 10.0, True)
    ends = {}
    for number in range(1, 9):
        here, there = socket.socketpair()
        lead.ranks[number], ends[number] = KnownRank(number, CountedLink(here), os.getpid()), Link(there)
    lead._watch = RankWatch(lead.ranks.values())
    lead._ticked = time.monotonic() + 1000.0  # so that no tick looks at all of them
    CountedLink.reads = 0
    yield lead, ends
    lead.close()
    for end in ends.values():
        end.close()


def wait(lead):
    return lead._waker.wait(lead.sockets(), 10.0)


def test_only_who_spoke_is_read(trainer):
    lead, ends = trainer
    assert list(lead.heard()) == []
    ends[3].send(Checked(0, ()))
    ends[7].send(Checked(0, ("w",)))
    assert wait(lead)
    assert {rank.rank: word for rank, word in lead.heard()} == {3: Checked(0, ()), 7: Checked(0, ("w",))}
    assert CountedLink.reads == 2 * 2  # each: a word, and no further one
    assert len(lead.sockets()) == 1


def test_a_rank_that_is_gone_is_heard_once(trainer):
    lead, ends = trainer
    ends[2].close()
    assert wait(lead)
    ((rank, word),) = lead.heard()
    assert (rank.rank, type(word)) == (2, Leave)
    assert list(lead.heard()) == []
    assert not lead._waker.wait(lead.sockets(), 0.0)


def test_what_a_rank_does_not_take_yet_is_waited_for(trainer):
    lead, ends = trainer
    link = lead.ranks[5].link
    while not link.unsent:
        link.send(Checked(0, ("w" * 100_000,)))
    assert (link.socket, True) in lead.sockets()
    while ends[5].read() is not None or link.unsent:
        list(lead.heard())
    assert len(lead.sockets()) == 1


def test_at_a_tick_all_are_looked_at(trainer):
    lead, ends = trainer
    lead._ticked = 0.0
    assert list(lead.heard()) == []
    assert CountedLink.reads == 8
    assert type(ends[1].read()).__name__ == "Tick"
