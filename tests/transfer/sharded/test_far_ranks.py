"""Ranks on other hosts than the one that leads: their bytes come by the network, and nothing else is otherwise."""

import os
import signal
from contextlib import ExitStack

import pytest
from processes import Child
from shard_ranks import Worker, alike, relayed, trainer, works

from hosts import free_address

LEAD = "tcps://10.77.0.3:7611"


def test_ranks_meet_where_receivers_come(folder):
    address = free_address()
    with trainer(folder, address, 3, timeout=20, far=(1, 2)) as ranks:
        assert ranks.heard() == ["ready"] * 3
        worker = Worker(address)
        assert ranks.send("well", "first", 1) == [("sent", "first")] * 3
        alike(ranks.send("partly", "no", 2), "UsageError", "of 3 ranks it lies on 0, 2")
        zero, failed, two = ranks.send("fails", "no", 2)
        assert failed == ("ValueError", "no more")
        alike([zero, two], "TransferAborted", "ValueError: no more")
        assert " on 127.0.0.1)" in zero[1]
        assert ranks.send("well", "last", 3) == [("sent", "last")] * 3
        assert worker.taken() == [("first", 1), ("last", 3)]


@pytest.mark.parametrize("at", [1, 3, 5])
def test_ctrl_c_on_a_far_rank_ends_the_version_on_all(folder, at):
    """What it still had to give of that version is no part of the next."""
    address = free_address()
    with trainer(folder, address, 2, timeout=20, far=(1,)) as ranks:
        ranks.heard()
        worker = Worker(address)
        ranks.order("ctrl-c", 0, at, [1])
        said = ranks.send("well", 2, 2)
        assert said[1][0] == "KeyboardInterrupt"
        assert said[0][0] == "TransferAborted"
        assert ranks.send("well", "last", 3) == [("sent", "last")] * 2
        assert worker.taken() == [("last", 3)]


def test_a_far_rank_that_dies_aborts_the_version(folder):
    address = free_address()
    with trainer(folder, address, 2, timeout=20, far=(1,)) as ranks:
        ranks.heard()
        worker = Worker(address)
        ranks.order("kill", 0, 4, [1])
        kind, words = ranks.send("well", 2, 2)[0]
        assert kind == "TransferAborted"
        assert "rank 1 (process" in words
    with trainer(folder, address, 3, timeout=20, far=(2,)) as ranks:
        ranks.heard()
        assert ranks.send("well", "last", 4) == [("sent", "last")] * 3
        assert worker.taken() == [("last", 4)]


def test_a_far_rank_needs_a_lead_of_its_job(folder, tmp_path):
    pytest.importorskip("cryptography")
    from hotweights.transfer.keys import make_keys

    for job in ("one", "two"):
        make_keys(tmp_path / job, ["127.0.0.1"])
    address = free_address()
    with (
        trainer(folder, address, 2, ranks=(0,), timeout=2, keys=tmp_path / "one") as lead,
        trainer(folder, address, 2, ranks=(1,), timeout=2, keys=tmp_path / "two", far=(1,)) as other,
    ):
        kind, words = other.heard()[0]
        assert kind == "ProtocolError", words
        assert "both ends need keys= of one job" in words
        kind, words = lead.heard()[0]
        assert kind == "TransferTimeout"
        assert "rank 1 of 2 did not make its Sender" in words
        assert "both ends need keys= of one job" in words


@pytest.mark.parametrize("relays", [False, True], ids=["direct", "relays"])
def test_ranks_and_workers_on_three_hosts(folder, hosts, tmp_path, relays):
    """Rank 0 is on one, ranks and a worker on each of two others. One is cut off, and a new trainer goes on."""
    options = {"insecure": True, "receivers": 2, "timeout": 30}
    ours = [hosts.names[2], hosts.names[0], hosts.names[1], hosts.names[0]]
    to = [f"unix:{tmp_path / name / 'socket'}" if relays else LEAD for name in hosts.names[:2]]
    with ExitStack() as stack:
        for host, address in zip(hosts.names[: 2 * relays], to, strict=False):
            stack.enter_context(relayed(host, LEAD, address))
        with Child(works, hosts.names[0], to[0]) as one, Child(works, hosts.names[1], to[1]) as other:
            with trainer(folder, LEAD, 4, hosts=ours, **options) as ranks:
                assert ranks.heard() == ["ready"] * 4
                assert ranks.send("well", "first", 1) == [("sent", "first")] * 4
                assert one.heard(60) == other.heard(60) == ("first", 1)
                hosts.link(1, "down")
                said = ranks.send("well", "lost", 2, [0, 1, 3])
                hosts.link(1, "up")
                assert {kind for kind, _ in said} <= {"TransferAborted", "TransferTimeout"}, said
                os.kill(ranks.ranks[2].process.pid, signal.SIGKILL)
            with trainer(folder, LEAD, 2, hosts=ours[:2], **options) as ranks:
                assert ranks.heard() == ["ready"] * 2
                assert ranks.send("well", "last", 3) == [("sent", "last")] * 2
                assert one.heard(60) == other.heard(60) == ("last", 3)
