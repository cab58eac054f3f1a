"""Rounds: what one rank meets, every rank raises in the same words, and the next version goes through."""

import itertools
import os
import signal
import socket

import pytest
from processes import Child, follow
from shard_ranks import Worker, alike, trainer, until_third


def test_every_rank_raises_what_one_meets(folder, address):
    with trainer(folder, address, 3, timeout=20) as ranks:
        assert ranks.heard() == ["ready"] * 3
        worker = Worker(address)
        assert ranks.send("well", "first", 1) == [("sent", "first")] * 3
        alike(
            ranks.send("partly", "no", 2),
            "UsageError",
            "its parts hold 2000 of its 3000 elements; of 3 ranks it lies on 0, 2",
        )
        alike(
            ranks.send("twice", "no", 2),
            "UsageError",
            "'one': its part [100, 10] at [0, 0] and its part [101, 10] at [0, 0] overlap",
        )
        alike(
            ranks.send("summand", "no", 2), "UsageError", "rank 1: these are no tensors with values: 'one' is a DTensor"
        )
        ranks.order("well", "a", 2, [0, 1])
        ranks.order("well", "b", 2, [2])
        alike(ranks.heard(), "UsageError", "the ranks do not send one version: rank 0 sends 'a' and rank 2 sends 'b'")
        zero, failed, two = ranks.send("fails", "no", 2)
        assert failed == ("ValueError", "no more")
        alike([zero, two], "TransferAborted", "ValueError: no more")
        assert "rank 1 (process" in zero[1]
        for _ in range(2):
            alike(
                ranks.send("apart", "no", 2),
                "UsageError",
                "copies of a tensor differ: 'two' has one value on rank 0, 2 and another on rank 1",
            )
        alike(ranks.send("renamed", "no", 2), "UsageError", "'model.one': its parts hold 1000 of its 3000 elements")
        alike(ranks.send("writes", "no", 2), "UsageError", "rank 1, 2: two: written while the version was sent")
        assert ranks.send("well", "last", 3) == [("sent", "last")] * 3
        assert worker.taken() == [("first", 1), ("last", 3)]


def test_copies_are_not_compared_where_nobody_asks(folder, address):
    with trainer(folder, address, 2, timeout=20, compare_copies=False) as ranks:
        ranks.heard()
        worker = Worker(address)
        assert ranks.send("apart", "a", 1) == [("sent", "a")] * 2
        assert ranks.send("well", "last", 3) == [("sent", "last")] * 2
        assert worker.taken()[-1] == ("last", 3)


def test_a_rank_that_never_calls_send_is_not_waited_for(folder, address):
    with trainer(folder, address, 3, timeout=2) as ranks:
        assert ranks.heard() == ["ready"] * 3
        worker = Worker(address)
        absent = ranks.send("well", "a", 1, [0, 1])
        alike(
            absent,
            "TransferTimeout",
            "version 'a' was not sent, and no receiver was told of it: rank 2 did not call send within 2 s",
        )
        assert ranks.send("well", "a", 1, [2]) == absent[:1], "who comes late hears the same"
        assert ranks.send("well", "a", 2) == [("sent", "a")] * 3
        absent = ranks.send("well", "b", 3, [1, 2])
        alike(absent, "TransferTimeout", "rank 0 did not call send within 2 s")
        assert ranks.send("well", "b", 3, [0]) == absent[:1]
        ranks.send("well", "skipped", 3, [0, 1])
        assert ranks.send("well", "last", 4) == [("sent", "last")] * 3
        assert worker.taken() == [("a", 2), ("last", 4)]


def test_a_group_that_was_destroyed_is_refused_on_all_ranks(folder, address):
    with trainer(folder, address, 2, timeout=10) as ranks:
        ranks.heard()
        ranks.order("destroy", "", ranks=[1])
        alike(
            ranks.send("well", "a", 1),
            "UsageError",
            "rank 1: group= is a process group, and this process has none (any more)",
        )


def test_a_trainer_is_complete_or_is_none(folder, address):
    with trainer(folder, address, 3, ranks=(0, 1), timeout=1) as ranks:
        alike(ranks.heard(), "TransferTimeout", "rank 2 of 3 did not make its Sender within 1 s")
    with trainer(folder, address, 3, ranks=(1, 2), timeout=1) as ranks:
        alike(ranks.heard(), "TransferTimeout", "rank 0 of 3 did not make its Sender within 1 s")
    with (
        trainer(folder, address, 2, ranks=(0,), timeout=2) as new,
        trainer(folder, address, 2, ranks=(1,), timeout=2) as stale,
    ):
        assert "its process group is not that of rank 0" in stale.heard()[0][1]
        assert "its process group is not that of rank 0" in new.heard()[0][1]
    with (  # It was restarted with another number of ranks, and one of those before is there still.
        trainer(folder, address, 2, ranks=(0,), timeout=1) as new,
        trainer(folder, address, 3, ranks=(1,), timeout=1) as stale,
    ):
        words = "rank 1 of 3 came to rank 0 of 2: its process group is a stale one"
        assert words in stale.heard()[0][1]
        kind, said = new.heard()[0]
        assert kind == "TransferTimeout"
        assert said.startswith("rank 1 of 2 did not make its Sender within 1 s")
        assert words in said


def _kill_at(folder, address, victim, at):
    """A rank dies at a word of the second version; workers go on with a trainer of another size."""
    with Child(follow, address) as one, Child(follow, address, None, "staged") as other:
        with trainer(folder, address, 2, timeout=5, receivers=2) as ranks:
            ranks.heard()
            assert ranks.send("well", 1, 1) == [("sent", "1")] * 2
            assert [worker.heard() for worker in (one, other)] == [(1, 1.0, "")] * 2
            ranks.order("kill", 0, at, [victim])
            said = ranks.send("well", 2, 2)
            passed = said[victim] is not None
            if victim == 1 and not passed:
                kind, words = said[0]
                assert (kind, words) == ("sent", "2") or (kind == "TransferAborted" and "rank 1 (process" in words)
            if victim == 0 and not passed:
                assert said[1][0] in ("PeerLost", "sent"), said
        with trainer(folder, address, 3, timeout=20, receivers=2) as ranks:
            ranks.heard()
            assert ranks.send("well", 3, 3) == [("sent", "3")] * 3
        held = [until_third(worker) - {1} for worker in (one, other)]
        assert held[0] == held[1], "all or none"
        assert held[0] in ({3}, {2, 3})
        assert (2 in held[0]) == (said[1 - victim] == ("sent", "2")) or victim == 0
    return passed


@pytest.mark.parametrize(("victim", "at"), [(1, 1), (1, 6), (0, 9)])
def test_a_rank_that_dies_takes_no_version_apart(folder, address, victim, at):
    _kill_at(folder, address, victim, at)


def test_a_rank_that_stands_still_is_given_up(folder, address):
    """It wakes up when its slot may be another's: what it does then it does alone."""
    with trainer(folder, address, 2, timeout=2) as ranks:
        ranks.heard()
        worker = Worker(address)
        assert ranks.send("well", 1, 1) == [("sent", "1")] * 2
        ranks.order("stop", 0, 3, [1])  # at the order to fill a slot, or a word before it
        ranks.order("well", 2, 2)
        kind, words = ranks.heard([0])[0]
        assert kind in ("TransferAborted", "TransferTimeout")
        assert "rank 1" in words
        os.kill(ranks.ranks[1].process.pid, signal.SIGCONT)
        kind, words = ranks.heard([1])[0]
        assert kind in ("PeerLost", "TransferTimeout")
        assert ranks.send("well", 3, 3, [0])[0][0] in ("TransferAborted", "TransferTimeout")
    with trainer(folder, address, 1, timeout=20) as ranks:
        ranks.heard()
        assert ranks.send("well", "last", 4) == [("sent", "last")]
        assert worker.taken() == [(1, 1), ("last", 4)]


@pytest.mark.parametrize(("rank", "at"), [(1, 1), (1, 3), (0, 1), (0, 5)])
def test_ctrl_c_on_one_rank_ends_the_version_on_all(folder, address, rank, at):
    with trainer(folder, address, 2, timeout=20) as ranks:
        ranks.heard()
        worker = Worker(address)
        assert ranks.send("well", 1, 1) == [("sent", "1")] * 2
        ranks.order("ctrl-c", 0, at, [rank])
        said = ranks.send("well", 2, 2)
        assert said[rank][0] == "KeyboardInterrupt"
        other = said[1 - rank]
        assert other[0] == "TransferAborted"
        assert f"rank {rank}" in other[1]
        assert "KeyboardInterrupt" in other[1]
        assert ranks.send("well", "last", 3) == [("sent", "last")] * 2
        assert worker.taken() == [(1, 1), ("last", 3)]


def test_workers_may_be_on_other_hosts(folder, address):
    with socket.create_server(("127.0.0.1", 0)) as free:
        away = f"tcps://127.0.0.1:{free.getsockname()[1]}"
    with trainer(folder, [address, away], 2, timeout=20, receivers=2) as ranks:
        assert ranks.heard() == ["ready"] * 2
        near, far = Worker(address), Worker(away)
        assert ranks.send("well", "last", 5) == [("sent", "last")] * 2
        assert near.taken() == far.taken() == [("last", 5)]
    with trainer(folder, "tcps://127.0.0.1:0", 2, timeout=2) as ranks:
        alike(ranks.heard(), "UsageError", "of tcps://127.0.0.1:0 none knows the port; give one, such as")


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_dies_at_every_word(folder, tmp_path, victim):
    for at in itertools.count():
        if _kill_at(folder, f"unix:{tmp_path / 'run' / str(at)}", victim, at):
            assert at > 8
            break
