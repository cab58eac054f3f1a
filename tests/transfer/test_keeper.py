"""A relay that keeps the last version gives it to workers that come later: whole, never an older one or a torn one."""

import contextlib
import logging
import os
import signal
import socket
import threading

import pytest
import torch
from ends import TIMEOUT, Thread, receiver, sender, tensors
from processes import Child, Killer, Tiny, context, send_twice, value_of
from typer.testing import CliRunner

import hotweights as hw
from hosts import follow, free_address, history, relay_process
from hotweights.cli import app
from hotweights.ranges import Range
from hotweights.sources.contracts import Request
from hotweights.testing import assert_same_bits
from hotweights.transfer.channel import Channel
from hotweights.transfer.decision import Decision, Known
from hotweights.transfer.handout import Handout
from hotweights.transfer.keeper import Keeper, lacks
from hotweights.transfer.messages import Account, Chunk, Offer, specs_of
from hotweights.transfer.peers import Peer
from hotweights.transfer.relay import Relay
from hotweights.transfer.states import Side


@contextlib.contextmanager
def keeping(source, to, keep=10**6, **options):
    """A relay in a thread that keeps versions."""
    with Relay(source, to, timeout=TIMEOUT, keep=keep, **options) as relay:
        thread = Thread(relay.run)
        try:
            yield relay
        finally:
            relay.close()
            thread.result()


def take(address, **options):
    with receiver(address, **options) as source:
        return dict(source.tensors()), source.version


def send(trainer, worker, content, version=1, **options):
    """Send one version to one worker."""
    with sender(trainer, **options) as sending:
        first = Thread(take, worker)
        sending.send(content, version=version)
        first.result()


@pytest.mark.parametrize("digests", [True, False])
def test_who_comes_between_two_versions_is_given_the_last_one_and_takes_part_in_the_next(digests, trainer, worker):
    with keeping(trainer, worker) as relay, sender(trainer, digests=digests) as sending:
        first, late = hw.LiveModel(Tiny()), hw.LiveModel(Tiny())
        with receiver(worker) as source, receiver(worker, name="late") as other:
            thread = Thread(first.load, source)
            sending.send(Tiny(1), version="step-1")
            thread.result()
            assert relay.kept == "step-1"
            late.load(other)
            assert (late.version, value_of(late.model)) == ("step-1", 1.0)
            threads = [Thread(first.update, source), Thread(late.update, other)]
            report = sending.send(Tiny(2), version="step-2", receivers=2)
            for each in threads:
                each.result()
        assert len(report.committed) == 2
        assert {(live.version, value_of(live.model)) for live in (first, late)} == {("step-2", 2.0)}
        assert relay.kept == "step-2"


def test_it_has_all_of_a_version_whatever_its_workers_want(trainer, worker):
    """The first worker wants a slice; who comes later wants everything, of every kind of tensor."""
    content = tensors() | {"w": torch.arange(40_000.0).view(200, 200)}

    def cut():
        room = torch.zeros(200 * 100 * 4, dtype=torch.uint8)
        with receiver(worker, name="cut") as source:
            source.wanted([Request("w", (Range(400, 400, 200, 800),), lambda: room)])
            with source.leases() as stream:
                assert [lease.name for lease in stream] == ["w"]
            with source.decision():
                return room.view(torch.float32).view(200, 100)

    with keeping(trainer, worker) as relay, sender(trainer) as sending:
        first = Thread(cut)
        report = sending.send(content, version=1)
        assert torch.equal(first.result(), content["w"][:, 100:])
        assert len(report.committed) == 1
        assert report.shared_nbytes == 80_000
        assert set(report.unwanted) == content.keys() - {"w"}  # by workers
        for _ in range(2):
            taken, version = take(worker)
            assert version == 1
            assert_same_bits(taken, content)
        assert relay.kept_nbytes < sum(tensor.nbytes for tensor in content.values()) + 64 * len(content)


def fail(source):
    with source.leases() as stream:
        next(iter(stream))
        raise ValueError("no room")


def test_a_version_that_was_given_up_is_not_kept(trainer, worker):
    def refuse():
        with receiver(worker) as source:
            dict(source.tensors())
            with pytest.raises(ValueError, match="no room"):
                fail(source)

    with keeping(trainer, worker) as relay, sender(trainer) as sending:
        first = Thread(refuse)
        sending.send(Tiny(1), version=1)
        with pytest.raises(hw.TransferAborted, match="no room"):
            sending.send(Tiny(2), version=2)
        first.result()
        assert relay.kept == 1
        taken, version = take(worker)
        assert (version, taken["two"].float().unique().tolist()) == (1, [1.0])


def test_who_has_it_and_connects_again_is_not_given_it_again(trainer, worker):
    """A new sender leads, so that the relay and its worker connect anew: the next version is the next one."""
    live = hw.LiveModel(Tiny())
    with keeping(trainer, worker) as relay, receiver(worker) as source:
        for step in (1, 2, 3):
            with sender(trainer) as sending:
                thread = Thread(live.load if step == 1 else live.update, source)
                sending.send(Tiny(step), version=step)
                thread.result()
            assert live.version == relay.kept == step


def test_without_a_sender_it_gives_what_it_has_and_the_next_sender_goes_on(trainer, worker):
    with keeping(trainer, worker) as relay:
        send(trainer, worker, Tiny(1), version=7)
        late = hw.LiveModel(Tiny())
        with receiver(worker, name="late") as source:
            late.load(source)
            assert (late.version, value_of(late.model)) == (7, 1.0)
            with sender(trainer) as sending:
                thread = Thread(late.update, source)
                sending.send(Tiny(2), version=8)
                thread.result()
            assert (late.version, value_of(late.model)) == (8, 2.0)
        assert relay.kept == 8
        assert take(worker)[1] == 8


def test_the_epoch_of_what_is_kept_is_told_to_the_next_sender(trainer, worker):
    """Where nobody else knows it any more: who was given that version listens to no sender of a smaller one."""
    with keeping(trainer, worker):
        with receiver(worker) as source:
            for step in (1, 2):
                with sender(trainer) as sending:
                    thread = Thread(lambda: dict(source.tensors()))
                    sending.send(Tiny(step), version=step)
                    thread.result()
        with sender(trainer) as sending, receiver(worker) as late:
            while sending.connected or not any(peer.relay for peer in sending._way._group.peers):
                pass
            assert dict(late.tensors())["two"].float().unique().tolist() == [2.0]
            thread = Thread(lambda: dict(late.tensors()))
            sending.send(Tiny(3), version=3)
            assert thread.result()["two"].float().unique().tolist() == [3.0]


@pytest.mark.parametrize("keep", ["1kB", 15_000])
def test_where_there_is_no_room_nothing_is_kept_and_that_is_said(keep, trainer, worker, caplog):
    """Of two versions of 12 kB none fits, or one at a time."""
    with keeping(trainer, worker, keep=keep) as relay, sender(trainer) as sending, receiver(worker) as source:
        for step in (1, 2):
            thread = Thread(lambda: dict(source.tensors()))
            sending.send(Tiny(step), version=step)
            thread.result()
            assert relay.kept == (None if keep == "1kB" else step)
            assert relay.kept_nbytes <= (0 if keep == "1kB" else keep)
    assert ("keep= allows 1.0 kB" in caplog.text) == (keep == "1kB")


def test_through_relays_that_follow_one_another(trainer, worker, tmp_path):
    """A host that comes later has it from the relay before its own, once; then its own relay has it too."""
    between, local = free_address(), f"unix:{tmp_path / 'other' / 'socket'}"
    content = tensors()
    with keeping(trainer, [worker, between]), sender(trainer) as sending:
        threads = [Thread(follow_to, worker, 2)]
        sending.send(content, version=1)
        with keeping(between, local) as second:
            for _ in range(2):
                taken, version = take(local)
                assert version == 1
                assert_same_bits(taken, content)
                while second.kept is None:  # Its worker has it a little before.
                    pass
            while len(sending.connected) != 1:  # The workers that left count no more.
                pass
            threads.append(Thread(follow_to, local, 2))
            sending.send(tensors(2), version=2, receivers=2)
            assert [thread.result() for thread in threads] == [[1, 2], [1, 2]]
            assert second.kept == 2


def follow_to(address, last):
    """Take versions until the last one; returns their names."""
    seen = []
    with receiver(address) as source:
        while not seen or seen[-1] != last:
            dict(source.tensors())
            seen.append(source.version)
    return seen


def test_a_newer_version_does_not_wait_for_a_latecomer_that_stands_still(trainer, worker, monkeypatch, caplog):
    began, give = threading.Event(), Handout.give
    monkeypatch.setattr(Handout, "give", lambda handout: (began.set(), give(handout)))
    with keeping(trainer, worker), sender(trainer, timeout=4.0) as sending, receiver(worker) as source:
        thread = Thread(lambda: dict(source.tensors()))
        sending.send(Tiny(1), version=1)
        thread.result()
        with receiver(worker, name="idle") as idle:
            assert idle.connect(TIMEOUT)
            assert began.wait(TIMEOUT)
            thread = Thread(lambda: dict(source.tensors()))
            sending.send(Tiny(2), version=2)
            thread.result()
            assert dict(idle.tensors())["two"].float().unique().tolist() == [2.0]
    assert "was not given to idle" in caplog.text
    assert "the sender has a newer version; it comes next" in caplog.text


def test_a_latecomer_that_cannot_take_it_waits_for_the_next(trainer, worker, caplog):
    with keeping(trainer, worker), sender(trainer) as sending:
        thread = Thread(take, worker)
        sending.send(Tiny(1), version=1)
        thread.result()
        with receiver(worker, name="other model") as source:
            with pytest.raises(ValueError, match="no room"):
                fail(source)
            # It was no member. As one that had kept the version before, it would be taken for a vote.
            assert source._connection._account is None
            thread = Thread(lambda: dict(source.tensors()))
            sending.send(Tiny(2), version=2)
            assert thread.result()["two"].float().unique().tolist() == [2.0]
    assert "version 1, which is kept, was not given to other model" in caplog.text
    assert "no room" in caplog.text


def test_bytes_that_are_not_the_senders_are_never_kept(trainer, worker, monkeypatch):
    monkeypatch.setattr("hotweights.transfer.keeper.copy_out", lambda raw, room, *, hashed: 0)
    with keeping(trainer, worker) as relay, sender(trainer) as sending:
        thread = Thread(take, worker)
        with pytest.raises(hw.TransferAborted, match="one: what the relay copied is not what was sent"):
            sending.send(Tiny(1), version=1)
        with pytest.raises(hw.TransferAborted):
            thread.result()
        assert relay.kept is None


def run_command(pipe, *words):
    """A command, until Ctrl-C; what it printed."""
    logging.root.handlers.clear()  # of pytest; the command makes its own
    pipe.send("begins")
    done = CliRunner().invoke(app, words)
    pipe.send((done.exit_code, done.output))


def test_the_command_keeps_and_says_what(trainer, worker):
    with (
        Child(run_command, "relay", "--from", trainer, "--to", worker, "--keep", "1MB") as relay,
        sender(trainer) as sending,
    ):
        assert relay.heard() == "begins"
        thread = Thread(take, worker)
        sending.send(Tiny(1), version="step-1")
        thread.result()
        assert take(worker)[1] == "step-1"
        os.kill(relay.process.pid, signal.SIGINT)
        code, said = relay.heard()
    assert code in (0, 130), said
    assert "version 'step-1' is kept for workers that come later; versions take 12.1 kB of memory here" in said


# Whoever dies.


def sent_at_last(sending, model, version):
    """A death that is noticed only now is told first; the next call waits for who comes in the place."""
    with contextlib.suppress(hw.TransferAborted):
        return sending.send(model, version=version)
    return sending.send(model, version=version)


def relay_that_dies(pipe, trainer, worker, at):
    """It dies at its ``at``-th point while it gives what it keeps; or when all are prepared."""
    if at is None:
        Handout._ask = lambda handout: os.kill(os.getpid(), signal.SIGKILL)
    with Relay(trainer, worker, timeout=TIMEOUT, keep="1MB") as relay, Killer(-1 if at is None else at) as killer:
        give = relay._give

        def giving(*arguments):
            killer.arm()
            give(*arguments)
            killer.arm(False)
            pipe.send("all points passed")

        relay._give = giving
        thread = Thread(lambda: (pipe.recv(), relay.close()))
        relay.run()
        thread.result()


def come_late(pipe, address):
    """Take versions until the third; say what is live after each attempt, also a first one that fails."""
    live = hw.LiveModel(Tiny())
    with receiver(address) as source:
        while live.version != 3:
            with contextlib.suppress(hw.TransferError, hw.UpdateAborted):
                live.load(source) if live.version is None else live.update(source)
            pipe.send((live.version, None if live.version is None else value_of(live.model), live.state))


@pytest.mark.parametrize("chained", [False, True])
def test_who_is_prepared_takes_it_whatever_becomes_of_the_relay(chained, trainer, worker, tmp_path):
    """Its group has taken the version before: there is nothing to be in doubt about."""
    between, local = free_address(), f"unix:{tmp_path / 'other' / 'socket'}"
    with contextlib.ExitStack() as stack:
        sending = stack.enter_context(sender(trainer))
        with Child(relay_that_dies, trainer, [worker, between], None) as killed:
            thread = Thread(take, worker)
            sending.send(Tiny(1), version=1)
            thread.result()
            if chained:
                stack.enter_context(keeping(between, local))
            late = stack.enter_context(Child(come_late, local if chained else between))
            assert killed.heard() is None
        assert killed.exitcode == -signal.SIGKILL
        assert late.heard() == (1, 1.0, hw.State.SERVING)
        late.process.kill()


def test_a_relay_killed_while_it_gives_leaves_a_latecomer_whole(trainer, worker):
    """It has that version or none, is never in doubt, and takes part in the next one through the next relay.

    Over the network, where nobody can read what was decided.
    """
    doors = [worker, between := free_address()]
    seen = set()
    for at in range(0, 100, 4):
        with contextlib.ExitStack() as stack:
            sending = stack.enter_context(sender(trainer))
            with Child(relay_that_dies, trainer, doors, at) as killed:
                thread = Thread(take, worker)
                sending.send(Tiny(1), version=1)
                thread.result()
                late = stack.enter_context(Child(come_late, between))
                if survived := killed.heard() is not None:
                    killed.say("end")
            assert killed.exitcode == (0 if survived else -signal.SIGKILL)
            with Child(relay_process, trainer, doors) as after:
                assert len(sent_at_last(sending, Tiny(3), version=3).committed) == 1
                after.say("end")
                after.heard()
            versions = []
            while 3 not in versions:
                version, value, state = late.heard()
                assert version == value, f"at point {at}"
                assert state is (hw.State.EMPTY if version is None else hw.State.SERVING), f"at point {at}"
                versions.append(version)
            assert set(versions) <= {None, 1, 3}
            seen.add(1 in versions)
        if survived:
            break
    assert seen == {False, True}
    assert at > 9


def test_a_sender_killed_at_any_moment_leaves_nothing_kept_that_its_workers_have_not(trainer, worker):
    """Who comes after that is given what they have, or the next version."""
    seen = set()
    for at in range(2, 100, 5):
        decided = context.Value("i", 0)
        with contextlib.ExitStack() as stack:
            stack.enter_context(keeping(trainer, worker))
            workers = [stack.enter_context(Child(follow, worker)) for _ in range(2)]
            with Child(send_twice, trainer, at, decided) as killed:
                if survived := killed.heard() is not None:
                    killed.say("end")
            late = stack.enter_context(Child(follow, worker))
            with sender(trainer, receivers=3) as after:
                assert len(after.send(Tiny(3), version=3).committed) == 3
            took = {2 in history(each)[0] for each in workers}
            assert len(took) == 1
            given = history(late)[0][0]
            assert given in ((2, 3) if took == {True} else (1, 3)), f"at point {at}"
            seen.add((*took, given))
        if survived:
            break
    assert {(False, 1), (True, 2)} <= seen


# What a keeper knows.


def offered(keeper, version, update=0, kept=0):
    offer = Offer(version, False, (("a", "uint8", (100,)),), epoch=1, kept=kept)
    coming = keeper.begin(offer, update or version, specs_of(offer))
    assert coming is not None
    coming.take(torch.full((100,), version, dtype=torch.uint8), [Chunk(0, Range(0, 100), 0, None)])
    coming.check_complete()


@pytest.mark.parametrize(
    ("told", "then"),
    [((2, Decision.COMMIT), 2), ((2, Decision.ABORT), 1), ((1, Decision.COMMIT), None), ((2, None), None)],
)
def test_in_doubt_it_gives_nothing_until_somebody_knows(told, then):
    keeper = Keeper(1000)
    offered(keeper, 1)
    keeper.end(Decision.COMMIT)
    offered(keeper, 2)
    assert keeper.kept.version == 1
    keeper.end(None)
    assert keeper.kept is None
    keeper.settle(*told)
    assert (keeper.kept and keeper.kept.version) == then
    if then is not None:
        with keeper.kept.source() as source:
            assert source.borrow("a").tolist() == [then] * 100
    offered(keeper, 3)
    keeper.end(Decision.ABORT)
    assert (keeper.kept and keeper.kept.version) == then
    assert keeper.nbytes <= 1000


def test_what_is_incomplete_or_comes_twice_is_refused():
    offer = Offer(1, False, (("a", "uint8", (100,)), ("b", "uint8", (4,))))
    coming = Keeper(1000).begin(offer, 1, specs_of(offer))
    memory = torch.zeros(200, dtype=torch.uint8)
    coming.take(memory, [Chunk(0, Range(0, 60), 0, None)])
    with pytest.raises(hw.TransferError, match="twice"):
        coming.take(memory, [Chunk(0, Range(50, 10), 0, None)])
    with pytest.raises(hw.TransferError, match="otherwise than it was asked for"):
        coming.take(memory, [Chunk(2, Range(0, 1), 0, None)])
    with pytest.raises(hw.TransferError, match="a: it never came"):
        coming.check_complete()


@pytest.mark.parametrize(
    ("epoch", "accounts", "expected"),
    [
        (0, (), True),
        (1, (), True),
        (2, (), True),  # What it was offered was given up before it looked.
        (3, (), False),
        (2, (Account(7, 0, Known.COMMITTED, 1),), False),
        (2, (Account(7, 0, Known.KEPT, 1),), True),
        (2, (Account(6, 0, Known.COMMITTED, 1),), True),
        (2, (Account(8, 0, Known.KEPT, 1),), False),
        (2, (Account(6, 0, Known.KEPT, 1), Account(7, 1, Known.COMMITTED, 1)), False),
    ],
)
def test_who_may_have_had_a_later_version_is_never_sent_back(epoch, accounts, expected):
    mine, theirs = socket.socketpair()
    with mine, theirs:
        peer = Peer(Channel(mine, Side.SENDER), "rank0", 0, accounts=accounts, epoch=epoch)
        assert lacks(peer, 7, 2) is expected
        peer.channel.session.update = 1
        assert not lacks(peer, 7, 2)


@pytest.mark.parametrize("wrong", ["a lot", 0, True, "0GB", -1])
def test_what_is_no_number_of_bytes_is_refused(wrong):
    with pytest.raises(hw.UsageError, match="keep="):
        Relay("tcps://127.0.0.1:7600", "unix:/tmp/x/y", keep=wrong)
