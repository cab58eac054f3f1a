"""Three hosts, which are network namespaces: a trainer and two workers on each of two. Links are cut and come back."""

import contextlib
import hashlib
import time

import pytest
import torch
from ends import Thread, receiver, sender
from namespaces import enter
from processes import Child, Tiny, value_of

import hotweights as hw
from hotweights.transfer.channel import Channel
from hotweights.transfer.messages import Accept, Commit, End, Filled, Offer
from hotweights.transfer.network_channel import SILENCE
from hotweights.transfer.relay import Relay

ADDRESS = "tcps://10.77.0.3:7600"
SOON = 20.0  # seconds in which a cut link is noticed, on a busy machine; a single wait may take three times as long


def relay(pipe, host, to):
    enter(host)
    with Relay(ADDRESS, to, insecure=True) as running:
        thread = Thread(lambda: (pipe.recv(), running.close()))
        running.run()
        thread.result()


def work(pipe, host, to):
    """Take versions until the last; after each attempt, say what is live and what went wrong."""
    enter(host)
    live = hw.LiveModel(Tiny())
    with receiver(to, insecure=to == ADDRESS, timeout=60, offer_timeout=60) as source:
        while live.version != "last":
            said = ""
            try:
                live.load(source) if live.version is None else live.update(source)
            except hw.UpdateAborted as error:
                said = f"{type(error.__cause__).__name__}: {error.__cause__}"
            pipe.send((live.version, value_of(live.model), said))


def send(pipe, host, at):
    """Send three versions; in the second stop where a message of the kind ``at`` is to be sent or has come."""
    enter(host)
    say, hear = Channel.send, Channel.read
    stopped = []

    def stop(kind):
        if kind is at and not stopped:
            stopped.append(kind)
            pipe.send("here")
            pipe.recv()

    def saying(channel, message, **options):
        stop(type(message))
        say(channel, message, **options)

    def hearing(channel):
        frame = hear(channel)
        if frame is not None:
            stop(type(frame.message))
        return frame

    with sender(ADDRESS, insecure=True, receivers=4, timeout=60) as sending:
        sending.send(Tiny(1), version=1)
        Channel.send, Channel.read = saying, hearing
        began = time.monotonic()
        try:
            said = sending.send(Tiny(2), version=2).committed
        except hw.TransferError as error:
            said = f"{type(error).__name__}: {error}"
        pipe.send((said, time.monotonic() - began))
        Channel.send, Channel.read = say, hear
        pipe.recv()
        pipe.send(sending.send(Tiny(3), version="last").committed)


@contextlib.contextmanager
def fleet(hosts, at, sockets=None):
    """A trainer that stops at a message of the second version, and four workers that have the first.

    With ``sockets``, a folder, there is a relay on each of their hosts.
    """
    with contextlib.ExitStack() as stack:
        trainer = stack.enter_context(Child(send, hosts.names[2], at))
        to = [ADDRESS] * 2
        if sockets is not None:
            to = [f"unix:{sockets / name / 'socket'}" for name in hosts.names[:2]]
            for host, address in zip(hosts.names[:2], to, strict=True):
                running = stack.enter_context(Child(relay, host, address))
                stack.callback(running.say, "end")
        workers = [stack.enter_context(Child(work, hosts.names[number // 2], to[number // 2])) for number in range(4)]
        for worker in workers:
            assert worker.heard(30) == (1, 1.0, "")
        assert trainer.heard(30) == "here"
        try:
            yield trainer, workers
        finally:
            for number in range(3):
                hosts.link(number, "up")


PHASES = [Filled, *(pytest.param(kind, marks=pytest.mark.long) for kind in (Offer, Accept, End))]


def history(worker):
    """Which versions it has had, each of them whole, until the last."""
    versions = []
    while "last" not in versions:
        version, value, said = worker.heard(60)
        assert value == {"last": 3}.get(version, version)
        assert "TransferInDoubt" not in said
        versions.append(version)
    return versions


@pytest.mark.parametrize("relayed", [False, True], ids=["direct", "relays"])
@pytest.mark.parametrize("at", PHASES, ids=lambda kind: kind.__name__.lower())
def test_a_host_that_is_cut_off_is_lost_soon_and_the_next_version_comes(at, relayed, hosts, tmp_path):
    with fleet(hosts, at, tmp_path if relayed else None) as (trainer, workers):
        hosts.link(0, "down")
        trainer.say("go on")
        said, seconds = trainer.heard(60)
        assert said.startswith("TransferAborted")
        assert "on 10.77.0.1" in said
        assert seconds < SOON
        hosts.link(0, "up")
        trainer.say("the last")
        assert len(trainer.heard(60)) == 4
        assert all(2 not in history(worker) for worker in workers)


def send_large(pipe, host):
    enter(host)
    with sender(ADDRESS, insecure=True, receivers=4, timeout=60, slots=4, slot_nbytes=1 << 18) as sending:
        report = sending.send(large(), version="last")
        pipe.send(
            (report.slowest, {each.host: each.phases["take bytes"] for each in report.hosts}, report.network_nbytes)
        )


def take_large(pipe, host, to):
    enter(host)
    with receiver(to, insecure=to == ADDRESS, timeout=60, offer_timeout=60) as source:
        pipe.send([hashlib.sha256(tensor.numpy().tobytes()).digest() for _, tensor in source.tensors()])


def large():
    return {f"{number}": torch.arange(500_000) + number for number in range(2)}


@pytest.mark.long
@pytest.mark.parametrize("relayed", [False, True], ids=["direct", "relays"])
def test_a_host_at_a_tenth_of_the_rate_is_waited_for_and_named(relayed, hosts, tmp_path):
    """All have the same bytes when it has them; how long that took is told of each host."""
    with contextlib.ExitStack() as stack:
        for number, mbit in enumerate((100, 1000)):
            hosts.limit(number, mbit)
            stack.callback(hosts.limit, number, None)
        to = [ADDRESS] * 2
        if relayed:
            to = [f"unix:{tmp_path / name / 'socket'}" for name in hosts.names[:2]]
            for host, address in zip(hosts.names[:2], to, strict=True):
                running = stack.enter_context(Child(relay, host, address))
                stack.callback(running.say, "end")
        workers = [
            stack.enter_context(Child(take_large, hosts.names[number // 2], to[number // 2])) for number in range(4)
        ]
        trainer = stack.enter_context(Child(send_large, hosts.names[2]))
        expected = [hashlib.sha256(tensor.numpy().tobytes()).digest() for tensor in large().values()]
        assert [worker.heard(60) for worker in workers] == [expected] * 4
        slowest, seconds, network = trainer.heard(60)
    nbytes = sum(tensor.nbytes for tensor in large().values())
    assert "on 10.77.0.1" in slowest
    assert seconds["10.77.0.1"] > 0.8 * (1 if relayed else 2) * nbytes / 12.5e6  # more is a busy machine's
    assert nbytes <= network / (2 if relayed else 4) < 1.01 * nbytes


@pytest.mark.long
@pytest.mark.parametrize("relayed", [False, True], ids=["direct", "relays"])
def test_a_link_that_is_cut_while_it_is_decided_is_waited_for(relayed, hosts, tmp_path):
    """For three times as long as would lose the host at any other time."""
    with fleet(hosts, Commit, tmp_path if relayed else None) as (trainer, workers):
        hosts.link(0, "down")
        trainer.say("go on")
        for worker in workers[2:]:
            assert worker.heard(60) == (2, 2.0, "")
        time.sleep(3 * SILENCE)
        hosts.link(0, "up")
        said, _ = trainer.heard(60)
        assert len(said) == 4
        for worker in workers[:2]:
            assert worker.heard(60) == (2, 2.0, "")
        trainer.say("the last")
        assert len(trainer.heard(60)) == 4
        for worker in workers:
            assert history(worker) == ["last"]
