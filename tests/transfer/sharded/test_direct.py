"""Bytes of ranks on other hosts go straight to receivers, and not by way of the host of rank 0."""

import itertools
import os
import signal
from contextlib import ExitStack

import pytest
from processes import Child, follow
from shard_ranks import Broad, relayed, trainer, until_third, works

from hosts import free_address
from hotweights.transfer.sharded import sharded_outbound

LEAD = "tcps://10.77.0.3:7611"
OPTIONS = {"slot_nbytes": 65536, "timeout": 20}
ALL = sum(tensor.nbytes for tensor in Broad().state_dict().values())
THEIRS = ALL - 400 * 400  # less rank 0's rows of the first


@pytest.fixture
def patient(monkeypatch):
    """Has rank 0 wait so long for receivers to come to ranks, however busy the machine is."""
    return lambda seconds: monkeypatch.setattr(sharded_outbound, "PATIENCE", seconds)


@pytest.mark.parametrize(("relays", "way"), [(False, ""), (True, ""), (False, "unreachable"), (True, "blackhole")])
def test_the_host_of_rank_0_carries_what_is_its_own(folder, hosts, tmp_path, patient, relays, way):
    """Ranks and a worker are on each of two other hosts. What a worker cannot reach comes by rank 0 all the same."""
    patient(0.5 if way else 60.0)
    ours = [hosts.names[2], hosts.names[0], hosts.names[1]]
    to = [f"unix:{tmp_path / name / 'socket'}" if relays else LEAD for name in hosts.names[:2]]
    with ExitStack() as stack:
        if way:
            stack.enter_context(hosts.apart(0, 1, way))
        for host, address in zip(hosts.names[: 2 * relays], to, strict=False):
            stack.enter_context(relayed(host, LEAD, address))
        workers = [stack.enter_context(Child(works, hosts.names[at], to[at], Broad)) for at in (0, 1)]
        ranks = stack.enter_context(trainer(folder, LEAD, 3, hosts=ours, insecure=True, receivers=2, **OPTIONS))
        assert ranks.heard() == ["ready"] * 3
        for number, version in enumerate(("first", "second", "last"), 1):
            before = hosts.carried(2)
            assert ranks.send("broad", version, number) == [("sent", version)] * 3
            assert [worker.heard(60) for worker in workers] == [(version, number)] * 2
            taken, sent = (after - then for after, then in zip(hosts.carried(2), before, strict=True))
            theirs = sent - 2 * 400 * 400
            if not way:  # All that is said of three slots, too.
                assert max(taken, theirs) < 0.05 * THEIRS
            else:  # Of each rank the worker of one host cannot be reached, and that of its own maybe later.
                assert THEIRS < taken < 1.05 * THEIRS
                assert THEIRS < theirs < 2.05 * THEIRS


def test_of_copies_each_host_gives_its_share_once_to_each_host(folder, hosts, tmp_path, patient):
    """Two workers on one host have a relay, and take every byte once; what lies on their host crosses no network."""
    patient(60.0)
    ours = [hosts.names[2], hosts.names[0], hosts.names[1]]
    near = f"unix:{tmp_path / 'run' / 'socket'}"
    with ExitStack() as stack:
        stack.enter_context(relayed(hosts.names[0], LEAD, near))
        places = ((0, near), (0, near), (1, LEAD))
        workers = [stack.enter_context(Child(works, hosts.names[at], to, Broad)) for at, to in places]
        ranks = stack.enter_context(trainer(folder, LEAD, 3, hosts=ours, insecure=True, receivers=3, **OPTIONS))
        assert ranks.heard() == ["ready"] * 3
        before = [hosts.carried(number) for number in range(3)]
        assert ranks.send("copies", "last", 4) == [("sent", "last")] * 3
        assert [worker.heard(60) for worker in workers] == [("last", 4)] * 3
        moved = [
            [(after - then) / ALL for after, then in zip(hosts.carried(number), old, strict=True)]
            for number, old in enumerate(before)
        ]
    (taken_a, sent_a), (taken_b, sent_b), (taken_0, sent_0) = moved
    chunk = 65536 / ALL  # A share is a third, give or take a chunk; and what is said beside it comes on top.
    assert taken_0 < 0.05
    assert sent_0 == pytest.approx(2 / 3, abs=2 * chunk + 0.05)
    assert [taken_a, taken_b] == pytest.approx([2 / 3] * 2, abs=chunk + 0.05)
    assert [sent_a, sent_b] == pytest.approx([1 / 3] * 2, abs=chunk + 0.05)


def _ends_at(folder, how, victim, at):
    """A rank dies, or is interrupted, at a word of the second version. Returns whether that came before its end."""
    address = free_address()
    with Child(follow, address, None, "journal", Broad) as one, Child(follow, address, None, "staged", Broad) as other:
        with trainer(folder, address, 3, far=(1, 2), receivers=2, **OPTIONS | {"timeout": 5}) as ranks:
            assert ranks.heard() == ["ready"] * 3
            assert ranks.send("broad", 1, 1) == [("sent", "1")] * 3
            assert [worker.heard() for worker in (one, other)] == [(1, 1.0, "")] * 2
            ranks.order(how, 0, at, [victim])
            said = ranks.send("broad", 2, 2)
            passed = said[victim] == ("sent", "2")
            if victim and not passed:
                kind, words = said[0]
                assert (kind, words) == ("sent", "2") or (kind == "TransferAborted" and f"rank {victim} (" in words)
            if how == "ctrl-c" and not passed:
                assert said[victim][0] == "KeyboardInterrupt"
                assert ranks.send("broad", 3, 3) == [("sent", "3")] * 3
        if how == "kill":
            with trainer(folder, address, 2, far=(1,), receivers=2, **OPTIONS) as ranks:
                assert ranks.heard() == ["ready"] * 2
                assert ranks.send("broad", 3, 3) == [("sent", "3")] * 2
        elif passed:
            with trainer(folder, address, 1, receivers=2, **OPTIONS) as ranks:
                assert ranks.heard() == ["ready"]
                assert ranks.send("broad", 3, 3) == [("sent", "3")]
        held = [until_third(worker) - {1} for worker in (one, other)]
        assert victim == 0 or held[0] == held[1], "all or none"
        assert victim == 0 or (2 in held[0]) == (said[0] == ("sent", "2"))
    return not passed


@pytest.mark.parametrize(("how", "victim", "at"), [("kill", 1, 9), ("ctrl-c", 2, 12), ("kill", 0, 20)])
def test_a_rank_that_ends_takes_no_version_apart(folder, how, victim, at):
    assert _ends_at(folder, how, victim, at)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", ["kill", "ctrl-c"])
def test_a_rank_ends_at_any_word(folder, how):
    last = next(at for at in itertools.count(step=11) if not _ends_at(folder, how, 1, at))
    assert last > 20


@pytest.mark.parametrize("at", [4, 12])
def test_a_receiver_that_dies_is_left_out(folder, at):
    address = free_address()
    options = OPTIONS | {"timeout": 10}
    with Child(follow, address, at, "journal", Broad) as victim, Child(follow, address, None, "staged", Broad) as other:
        with trainer(folder, address, 3, far=(1, 2), receivers=2, on_lost="drop", **options) as ranks:
            assert ranks.heard() == ["ready"] * 3
            assert ranks.send("broad", 1, 1) == [("sent", "1")] * 3
            assert victim.heard() == other.heard() == (1, 1.0, "")
            assert ranks.send("broad", 2, 2) == [("sent", "2")] * 3
            assert other.heard() == (2, 2.0, "")
            assert victim.heard() is None
        with trainer(folder, address, 2, far=(1,), **options) as ranks:
            assert ranks.heard() == ["ready"] * 2
            assert ranks.send("broad", 3, 3) == [("sent", "3")] * 2
            assert other.heard() == (3, 3.0, "")


def test_a_rank_that_stands_still_is_named_and_receivers_stay(folder):
    """They wait for its bytes, and hear of the abort all the same."""
    address = free_address()
    with Child(follow, address, None, "journal", Broad) as worker:
        with trainer(folder, address, 3, far=(1, 2), **OPTIONS | {"timeout": 5}) as ranks:
            assert ranks.heard() == ["ready"] * 3
            assert ranks.send("broad", 1, 1) == [("sent", "1")] * 3
            assert worker.heard() == (1, 1.0, "")
            ranks.order("stop", 0, 15, [1])
            ranks.order("broad", 2, 2)
            for kind, words in ranks.heard([0, 2]):
                assert kind in ("TransferAborted", "TransferTimeout")
                assert "rank 1" in words
            version, value, said = worker.heard()
            assert (version, value) == (1, 1.0)
            assert "rank 1" in said, said
            os.kill(ranks.ranks[1].process.pid, signal.SIGCONT)
            ranks.heard([1])
        with trainer(folder, address, 2, far=(1,), **OPTIONS) as ranks:
            assert ranks.heard() == ["ready"] * 2
            assert ranks.send("broad", 3, 3) == [("sent", "3")] * 2
            assert worker.heard() == (3, 3.0, "")
