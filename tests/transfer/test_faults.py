"""Whoever dies, fails or lies, at whatever moment: the others know soon, agree on one version, and go on."""

import contextlib
import os
import re
import signal
import socket
import threading

import pytest
import torch
from ends import TIMEOUT, Thread, receiver, sender, tensors
from processes import Child, Tiny, context, follow, send_twice, value_of

import hotweights as hw
from hotweights.testing import assert_same_bits
from hotweights.transfer import connection as connection_module
from hotweights.transfer.ballot import Ballot
from hotweights.transfer.channel import Channel
from hotweights.transfer.connection import Connection
from hotweights.transfer.decision import Decision
from hotweights.transfer.messages import Abort, Filled
from hotweights.transfer.outbound import Outbound
from hotweights.transfer.states import SessionState


def history(child):
    """What it had live after each attempt, until the third version; never torn. Failed attempts say why."""
    versions = []
    while 3 not in versions:
        heard = child.heard()
        assert heard is not None, "a survivor died"
        version, value, said = heard
        assert version == value
        assert bool(said) == (version in versions)
        versions.append(version)
    return versions


@pytest.mark.parametrize("atomic", ["journal", pytest.param("staged", marks=pytest.mark.long)])
def test_a_sender_killed_at_any_moment_leaves_all_at_one_version(atomic, address):
    seen = set()
    for at in range(100):
        decided = context.Value("i", 0)
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(Child(follow, address, None, atomic)) for _ in range(2)]
            with Child(send_twice, address, at, decided) as killed:
                if survived := killed.heard() is not None:
                    killed.say("end")
            assert killed.exitcode == (0 if survived else -signal.SIGKILL)
            with sender(address, receivers=2) as after:  # Over the socket that a dead process left.
                assert len(after.send(Tiny(3), version=3).committed) == 2
            took = [2 in history(worker) for worker in workers]
            assert took == [decided.value == Decision.COMMIT.value] * 2, f"at point {at}"
            seen.update(took)
        if survived:
            break
    assert seen == {False, True}
    assert at > 20


@pytest.mark.parametrize("on_lost", ["abort", "drop"])
def test_a_receiver_killed_at_any_moment_leaves_the_others_at_one_version(on_lost, address):
    seen = set()
    for at in range(100):
        with (
            Child(follow, address) as other,
            Child(follow, address, at) as victim,
            sender(address, receivers=2, on_lost=on_lost) as sending,
        ):
            sending.send(Tiny(1), version=1)
            try:
                report = sending.send(Tiny(2), version=2)
                committed, told = report.committed, str(report)
            except (hw.TransferAborted, hw.TransferIncomplete) as error:
                committed, told = getattr(error, "committed", ()), str(error)
            assert victim.name in told
            victim.heard()
            survived = victim.heard() is not None  # If not, it is dead before the third version is offered.
            victim.process.join(0 if survived else TIMEOUT)  # A pipe may close before a socket.
            assert other.name in sending.send(Tiny(3), version=3, receivers=1).committed
            took = 2 in history(other)
            assert took == (other.name in committed), f"at point {at}"
            seen.add(took)
        assert victim.exitcode == (0 if survived else -signal.SIGKILL)
        if survived:
            break
    assert seen == ({False, True} if on_lost == "abort" else {True})
    assert at > 10


def take(address, **options):
    with receiver(address, **options) as source:
        return dict(source.tensors())


def test_an_exception_in_the_consumer_at_every_tensor_reaches_the_sender(address):
    content = tensors()

    def fail(source, at):
        with source.leases() as stream:
            for number, _ in enumerate(stream):
                if number == at:
                    raise ValueError(f"at {at}")

    def consume():
        with receiver(address) as source:
            for at in range(len(content)):
                with pytest.raises(ValueError, match=f"at {at}"):
                    fail(source, at)
            return dict(source.tensors())

    taking = Thread(consume)
    with sender(address) as sending:
        for at in range(len(content)):
            with pytest.raises(hw.TransferAborted, match=rf"process \d+: ValueError: at {at}$"):
                sending.send(content, version=at)
        sending.send(content, version="next")
    assert_same_bits(taking.result(), content)


def test_an_exception_in_a_live_model_at_every_layer_leaves_version_n_everywhere(address):
    class Broken(Tiny):
        at = None

    def process(layer):
        if Broken.at is not None:
            raise ValueError("processing failed")

    bad, good = hw.LiveModel(Broken(), process=process), hw.LiveModel(Tiny())

    def updates(live):
        with receiver(address) as source:
            live.load(source)
            with pytest.raises(hw.UpdateAborted, match="processing failed"):
                live.update(source)
            live.update(source)

    taking = [Thread(updates, bad), Thread(updates, good)]
    with sender(address, receivers=2) as sending:
        sending.send(Tiny(1), version=1)
        Broken.at = 0
        with pytest.raises(hw.TransferAborted, match="processing failed"):
            sending.send(Tiny(2), version=2)
        assert {value_of(live.model) for live in (bad, good)} == {1}
        Broken.at = None
        sending.send(Tiny(3), version=3)
    for thread in taking:
        thread.result()
    assert {value_of(live.model) for live in (bad, good)} == {3}


def test_a_sender_returns_when_version_n_is_back_and_not_before(address, monkeypatch):
    offered, waits_for_one, returned = (threading.Event() for _ in range(3))
    look = Outbound._look

    def looking(outbound, seconds=0.0):
        peers = (*outbound._members, *outbound._leaving)
        if outbound._over and seconds and sum(peer.state is not SessionState.IDLE for peer in peers) == 1:
            waits_for_one.set()
        look(outbound, seconds)

    def refuse():
        with receiver(address) as source:
            assert source.manifest
            assert offered.wait(TIMEOUT)  # An offer that was given up before anybody looked at it is not seen.
            source.refuse(ValueError("no"))

    def put_back():
        with receiver(address) as source:
            source.wanted(["w"])
            offered.set()
            with pytest.raises(hw.TransferAborted, match="ValueError: no"), source.leases() as stream:
                list(stream)
            assert waits_for_one.wait(TIMEOUT), "the sender does not wait for this member"
            assert not returned.is_set()
            source.refuse(ValueError("put back"))
            assert returned.wait(TIMEOUT)

    monkeypatch.setattr(Outbound, "_look", looking)

    taking = [Thread(refuse), Thread(put_back)]
    with sender(address, receivers=2) as sending:
        with pytest.raises(hw.TransferAborted, match="ValueError: no"):
            sending.send({"w": torch.zeros(3)}, version=1)
        returned.set()
        for thread in taking:
            thread.result()


@pytest.mark.parametrize(
    ("error", "said"), [(ValueError("no gather"), "ValueError: no gather"), (KeyboardInterrupt(), "KeyboardInterrupt")]
)
def test_a_worker_reads_where_it_was_that_the_sender_failed(error, said, address):
    def pairs():
        yield "w", torch.zeros(3)
        raise error

    def take():
        with receiver(address) as source:
            dict(source.tensors())

    taking = Thread(take)
    manifest = hw.Manifest(hw.TensorSpec(name, torch.float32, (3,)) for name in "wv")
    with sender(address) as sending, pytest.raises(type(error)):
        sending.send(pairs(), version=1, manifest=manifest)
    why = rf"the sender \(process {os.getpid()} on {re.escape(socket.gethostname())}\): {said}$"
    with pytest.raises(hw.TransferAborted, match=why):
        taking.result()


def test_who_is_late_for_an_offer_that_was_given_up_is_told_so(address, monkeypatch):
    aborted, given_up = threading.Semaphore(0), threading.Event()
    say, standing, left = Channel.send, Connection._standing, connection_module.left

    def noting(channel, message, **options):
        say(channel, message, **options)
        if isinstance(message, Abort):
            aborted.release()

    def late(connection, offer):
        if threading.current_thread() is threads[1]:
            for _ in threads:  # Each of the two is told of the abort.
                assert aborted.acquire(timeout=TIMEOUT)
            assert standing(connection, offer) is None
            given_up.set()
            return None
        return standing(connection, offer)

    def left_over(deadline):
        return 0.0 if given_up.is_set() and threading.current_thread() is threads[1] else left(deadline)

    def refuse():
        with receiver(address) as source:
            assert source.manifest
            source.refuse(ValueError("no"))

    def wait_in_vain():
        with receiver(address) as source, pytest.raises(hw.TransferTimeout, match=r"gave up what it offered: .*: no"):
            source.leases()

    monkeypatch.setattr(Channel, "send", noting)
    monkeypatch.setattr(Connection, "_standing", late)
    monkeypatch.setattr(connection_module, "left", left_over)
    threads = [Thread(refuse), Thread(wait_in_vain)]
    with sender(address, receivers=2) as sending:
        with pytest.raises(hw.TransferAborted, match="no"):
            sending.send({"w": torch.zeros(3)}, version=1)
        for thread in threads:
            thread.result()


@pytest.mark.parametrize("on_lost", ["abort", "drop"])
def test_a_receiver_that_never_releases_is_named_after_the_deadline(on_lost, address):
    go_on = threading.Event()
    content = {f"w{number}": torch.full((1000,), float(number)) for number in range(20)}
    said = r"did not release a slot within 0\.3 s" if on_lost == "abort" else "given this receiver up"

    def hold():
        with receiver(address) as source, source.leases() as stream:
            next(stream)
            go_on.wait(30)
            with pytest.raises(hw.TransferError, match=said):
                list(stream)

    taking = [Thread(hold), Thread(take, address)]
    with sender(address, receivers=2, digests=False, timeout=0.3, on_lost=on_lost) as sending:
        if on_lost == "abort":
            with pytest.raises(hw.TransferAborted, match=r"did not release a slot within 0\.3 s"):
                sending.send(content, version=1)
            with pytest.raises(hw.TransferAborted, match="did not release"):
                taking[1].result()
        else:
            report = sending.send(content, version=1)
            assert len(report.committed) == len(report.lost) == 1
            assert "did not release" in str(report)
            assert_same_bits(taking[1].result(), content)
        go_on.set()
        taking[0].result()


def test_slots_are_filled_again_only_when_every_lease_in_them_has_ended(address):
    """What a lease shows does not change before it ends, whatever the sender has in store."""
    content = {f"w{number}": torch.full((1000,), float(number)) for number in range(40)}

    def look():
        with receiver(address) as source, source.leases() as stream:
            for lease in stream:
                for _ in range(3):
                    assert lease.tensor.unique().tolist() == [float(lease.name[1:])]

    taking = [Thread(look), Thread(look)]
    with sender(address, receivers=2, digests=False) as sending:
        sending.send(content, version=1)
    for thread in taking:
        thread.result()


def test_a_slot_changed_after_it_was_handed_over_is_caught_by_the_digest(address, monkeypatch):
    live = hw.LiveModel(Tiny())
    live.load(Tiny(1))
    say = Channel.send

    def update():
        with receiver(address) as source:
            with pytest.raises(hw.UpdateAborted):
                live.update(source)
            live.update(source)

    taking = Thread(update)
    with sender(address) as sending:

        def corrupting(channel, message, **options):
            if isinstance(message, Filled):
                sending._way.slots.memories[message.slot][message.chunks[0].offset] ^= 1
            say(channel, message, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Channel, "send", corrupting)
            with pytest.raises(hw.TransferAborted, match=r"one: [0-9a-f]{16} was sent, [0-9a-f]{16} was copied"):
                sending.send(Tiny(2), version=2)
        assert value_of(live.model) == 1
        sending.send(Tiny(3), version=3)
    taking.result()
    assert value_of(live.model) == 3


def test_what_was_copied_is_private_when_there_are_digests(address):
    """A sender that overwrites its slots while a lease runs changes nothing any more."""
    content = tensors()
    ends = {}

    def consume():
        tensors = {}
        with receiver(address) as source, source.leases() as stream:
            for lease in stream:
                if "rogue" in ends:
                    for memory in ends["rogue"]:
                        memory[64 * 40 :].fill_(0xFF)  # beyond what is still to be copied of this slot
                tensors[lease.name] = lease.own()
        return tensors

    one = {"only": content["large"]}
    taking = Thread(consume)
    with sender(address, slot_nbytes=65536) as sending:
        ends["rogue"] = sending._way.slots.memories
        sending.send(one, version=1)
    assert_same_bits(taking.result(), one)


def test_a_sender_that_decides_nothing_is_outvoted(address, monkeypatch):
    """A receiver that waits in vain for the decision writes abort; the sender that wakes up late finds it."""
    gave_up = threading.Event()
    end = Outbound._end

    def late(self):
        end(self)
        assert gave_up.wait(30)

    def consume():
        with receiver(address, timeout=0.2) as source:
            with pytest.raises(hw.TransferTimeout):
                dict(source.tensors())
            gave_up.set()
            return dict(source.tensors())

    taking = Thread(consume)
    with sender(address, timeout=0.2) as sending:
        with monkeypatch.context() as patch:
            patch.setattr(Outbound, "_end", late)
            with pytest.raises(hw.TransferAborted, match="gave up waiting for the decision"):
                sending.send({"w": torch.zeros(3)}, version=1)
        for _ in range(20):
            with contextlib.suppress(hw.TransferTimeout):
                sending.send({"w": torch.ones(3)}, version=2)
                break
    assert taking.result()["w"].tolist() == [1, 1, 1]


def test_closing_from_another_thread_ends_every_wait(address):
    waiting = receiver(address)
    thread = Thread(lambda: waiting.manifest)
    waiting.close()
    with pytest.raises(hw.Closed):
        thread.result()
    alone = sender(address)
    thread = Thread(lambda: alone.send({"w": torch.zeros(1)}, version=1))
    alone.close()
    with pytest.raises(hw.Closed):
        thread.result()


def test_nobody_comes(address):
    with sender(address, timeout=0.05) as sending, pytest.raises(hw.TransferTimeout, match="0 of 1 receivers"):
        sending.send({"w": torch.zeros(1)}, version=1)
    with receiver(address, offer_timeout=0.05) as source, pytest.raises(hw.TransferTimeout, match="nobody listens"):
        source.leases()


def test_nobody_waits_for_a_sender_that_is_gone(address):
    """``reconnect=False`` is for whoever is told when another trainer comes: it waits for offers, and for no sender."""
    with receiver(address, reconnect=False) as source, pytest.raises(hw.TransferError, match="no sender is at"):
        source.leases()
    with receiver(address, reconnect=False) as source:
        with sender(address):
            assert source.poll() is None  # It is connected now.
            waiting = Thread(lambda: source.manifest)
        with pytest.raises(hw.TransferError, match="no sender is at"):
            waiting.result()


def test_a_forked_child_does_not_hide_its_parents_death(address):
    """A worker of a data loader, say, that outlives the trainer: the receivers notice all the same."""

    def trainer(pipe):
        with sender(address) as sending:
            sending.send(Tiny(1), version=1)
            left, _ = os.pipe()
            child = os.fork()
            if child == 0:
                os.read(left, 1)  # until the test ends: it holds the other end, too
                os._exit(0)
            pipe.send(child)
            sending.send(Tiny(2), version=2)

    source = receiver(address)
    with source, Child(trainer) as killed:
        dict(source.tensors())
        child = killed.heard()
        try:
            assert source.manifest  # offered, and then nothing more
            os.kill(killed.process.pid, signal.SIGKILL)
            with pytest.raises(hw.PeerLost):
                dict(source.tensors())
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("first", Decision)
def test_a_ballot_is_written_once_by_whoever_is_first(first):
    for _ in range(20):
        ballot = Ballot.new()
        assert ballot.read() is None
        second = Decision.ABORT if first is Decision.COMMIT else Decision.COMMIT
        assert ballot.decide(first) is first
        assert ballot.decide(second) is first
        assert ballot.read() is first
        ballot.close()
        ballot.close()


def test_racing_processes_read_one_decision():
    for _ in range(5):
        ballot = Ballot.new()
        start = context.Barrier(4)

        def vote(pipe, decision, ballot=ballot, start=start):
            start.wait(10)
            pipe.send(ballot.decide(decision).name)

        with contextlib.ExitStack() as stack:
            voters = [stack.enter_context(Child(vote, decision)) for decision in (*Decision, *Decision)]
            assert len({voter.heard() for voter in voters}) == 1
        ballot.close()
