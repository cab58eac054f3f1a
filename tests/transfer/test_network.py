"""Between hosts: the same contract over TCP; whoever dies, one version or a doubt by name; strangers stay out."""

import contextlib
import datetime
import errno
import itertools
import logging
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from ends import TIMEOUT, Thread, receiver, sender, tensors
from hypothesis import given
from hypothesis import strategies as st
from processes import Child, Tiny, context, send_twice, value_of

import hotweights as hw
from hosts import connected, follow, free_address, history
from hotweights.ranges import Range
from hotweights.testing import TRANSPORT_CONTRACT
from hotweights.transfer import network as network_module
from hotweights.transfer import peers as peers_module
from hotweights.transfer.channel import Channel
from hotweights.transfer.decision import Decision
from hotweights.transfer.endpoint import endpoint_of
from hotweights.transfer.flow import GREETING, TOKEN, stretches
from hotweights.transfer.keys import make_keys
from hotweights.transfer.messages import PROTOCOL, Accept, Chunk, Filled, Hello, Wanted, encode
from hotweights.transfer.network_channel import NetworkChannel
from hotweights.transfer.outbound import Outbound
from hotweights.transfer.relay import Relay
from hotweights.transfer.resolve import Resolver
from hotweights.transfer.states import SessionState, Side

CONTENT = {"a": torch.arange(5.0), "b": torch.arange(3)}


@pytest.fixture
def address():
    return free_address()


class Network:
    """A group at one address."""

    def __init__(self, address, options, **both):
        self._address, self._options, self._both = address, options, both

    def sender(self, receivers):
        return sender(self._address, receivers=receivers, **self._options, **self._both)

    def receiver(self):
        return receiver(self._address, **self._both)


@pytest.mark.parametrize("check", TRANSPORT_CONTRACT, ids=lambda check: check.__name__)
@pytest.mark.parametrize("options", [{}, {"digests": False, "slots": 4, "slot_nbytes": 1 << 20}], ids=str)
def test_the_network_is_a_transport(check, options, address):
    check(lambda: Network(address, options), tensors())


@pytest.mark.parametrize("check", TRANSPORT_CONTRACT, ids=lambda check: check.__name__)
def test_with_keys_it_is_one_too(check, jobs, address):
    check(lambda: Network(address, {}, keys=jobs[0]), tensors())


def take(address, **options):
    with receiver(address, **options) as source:
        return dict(source.tensors())


# Whoever dies.


@pytest.mark.parametrize("atomic", ["journal", pytest.param("staged", marks=pytest.mark.long)])
def test_a_sender_killed_at_any_moment_leaves_one_version(atomic, address):
    """Who has not heard the decision holds the version before until the next sender has heard all, and says it."""
    seen = set()
    for at in range(100):
        decided = context.Value("i", 0)
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(Child(follow, address, None, atomic)) for _ in range(2)]
            with Child(send_twice, address, at, decided) as killed:
                if survived := killed.heard() is not None:
                    killed.say("end")
            assert killed.exitcode == (0 if survived else -signal.SIGKILL)
            with sender(address, receivers=2) as after:
                assert len(after.send(Tiny(3), version=3).committed) == 2
            (first, doubt), (second, other_doubt) = map(history, workers)
            assert not doubt, f"at point {at}"
            assert not other_doubt, f"at point {at}"
            assert (2 in first) == (2 in second), f"at point {at}"
            if decided.value != Decision.COMMIT.value:
                assert 2 not in first, f"at point {at}"
            seen.add((2 in first, decided.value))
        if survived:
            break
    # Also: a commit that nobody had heard of when its sender died.
    assert seen == {(False, 0), (False, Decision.COMMIT.value), (True, Decision.COMMIT.value)}
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
            assert f"{victim.name} on 127.0.0.1" in told
            victim.heard()
            survived = victim.heard() is not None
            victim.process.join(0 if survived else TIMEOUT)  # A pipe may close before a socket.
            name = f"{other.name} on 127.0.0.1"
            assert name in sending.send(Tiny(3), version=3, receivers=1).committed
            versions, doubted = history(other)
            assert (2 in versions) == (name in committed), f"at point {at}"
            assert not doubted
            seen.add(2 in versions)
        assert victim.exitcode == (0 if survived else -signal.SIGKILL)
        if survived:
            break
    assert seen == ({False, True} if on_lost == "abort" else {True})
    assert at > 10


@pytest.mark.parametrize("failing", [None, 0, 1])
def test_workers_on_both_sides_of_the_network_decide_together(failing, address, tmp_path):
    """One that fails on this host keeps those on others from the version, and the other way round."""
    local = f"unix:{tmp_path / 'run' / 'socket'}"

    def process(layer):
        if failing is not None and any(bool((parameter == 2).all()) for parameter in layer.parameters()):
            raise ValueError("processing failed")

    def follow(number, where):
        live = hw.LiveModel(Tiny(), process=process if number == failing else None)
        with receiver(where, name=f"rank{number}") as source:
            live.load(source)
            if failing is None:
                live.update(source)
            else:
                with pytest.raises(hw.UpdateAborted, match="processing failed"):
                    live.update(source)
            return live.version, value_of(live.model)

    threads = [Thread(follow, number, where) for number, where in enumerate((local, address))]
    with sender([local, address], receivers=2) as sending:
        assert sending.address == f"{local}, {address}"
        sending.send(Tiny(1), version=1)
        if failing is None:
            report = sending.send(Tiny(2), version=2)
            assert report.nbytes <= report.network_nbytes < report.nbytes + 4096  # once, to the one on another host
            assert "over the network" in str(report)
            assert set(report.committed) == {
                f"rank0 (process {os.getpid()})",
                f"rank1 (process {os.getpid()} on 127.0.0.1)",
            }
        else:
            with pytest.raises(hw.TransferAborted, match=rf"rank{failing} \(process .*: ValueError: processing failed"):
                sending.send(Tiny(2), version=2)
        held = 2 if failing is None else 1
        assert [thread.result() for thread in threads] == [(held, held)] * 2


def test_of_several_addresses_none_is_kept_when_one_is_taken(address, tmp_path):
    local = f"unix:{tmp_path / 'run' / 'socket'}"
    with sender(address) as first:
        with pytest.raises(hw.AddressTaken, match=rf"held by process {os.getpid()} on this host"):
            sender([local, address])
        with sender(local):
            pass
        assert first.address == address


def test_a_sender_has_an_address():
    with pytest.raises(hw.UsageError, match="found none"):
        hw.Sender([])


# In doubt.


def test_who_waits_for_the_decision_is_interrupted_when_it_has_heard_it(address, monkeypatch):
    """A signal cannot take back a vote that others may have counted."""

    def trainer(pipe):
        end = Outbound._end

        def late(outbound):
            end(outbound)
            os.kill(os.getppid(), signal.SIGUSR1)
            pipe.recv()

        with sender(address) as sending:
            sending.send(Tiny(1), version=1)
            with monkeypatch.context() as patch:
                patch.setattr(Outbound, "_end", late)
                pipe.send(sending.send(Tiny(2), version=2).committed)

    class Interrupted(Exception):
        pass

    def interrupt(number, frame):
        raise Interrupted

    live = hw.LiveModel(Tiny())
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with Child(trainer) as sending, receiver(address) as source:
            live.load(source)
            hear = type(source._inbound.member)._hear_from_afar

            def hearing(member, *why):
                sending.say("decide")
                hear(member, *why)

            monkeypatch.setattr(type(source._inbound.member), "_hear_from_afar", hearing)
            with pytest.raises(Interrupted):
                live.update(source)
            assert (live.version, value_of(live.model)) == (2, 2)
            assert sending.heard() == (f"process {os.getpid()} on 127.0.0.1",)
    finally:
        signal.signal(signal.SIGUSR1, before)


# Strangers.


def admitted(door):
    """The next guest of a door."""
    for _ in range(100_000):
        if (guest := door.admit()) is not None:
            return guest
    raise AssertionError("nobody came")


def refused(address, work, caplog, **options):
    """What a sender logs of strangers while a good receiver takes a version."""
    with (
        caplog.at_level(logging.WARNING, "hotweights"),
        sender(address, **options) as sending,
        contextlib.ExitStack() as stack,
    ):
        handle = sending.send(CONTENT, version=1, wait=False)
        for stranger in work(stack) or ():
            stranger.join()
        good = Thread(lambda: take(address, keys=options.get("keys")))
        handle.result(TIMEOUT)
        assert good.result().keys() == CONTENT.keys()
        doors = sending._way._group._doors
        assert len(sending._way._group.peers) + sum(len(door.sockets()) - 1 for door in doors) <= 2 * 64 + 1
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("both", [False, True], ids=["plain", "keys"])
def test_a_thousand_connections_that_say_nothing_let_a_receiver_in(both, request, address, caplog):
    keys = request.getfixturevalue("jobs")[0] if both else None

    def connect(stack):
        silent = [stack.enter_context(contextlib.closing(socket.socket())) for _ in range(1000)]
        for connection in silent:
            connection.setblocking(False)
            connection.connect_ex(("127.0.0.1", int(address.rpartition(":")[2])))

    assert len(refused(address, connect, caplog, keys=keys)) <= 2


WORDS = {
    "a web client": (b"GET / HTTP/1.1\r\nHost: trainer\r\n\r\n", "no frame of hotweights"),
    "another protocol": (encode(0, Hello(1)).replace(b"hotw" + PROTOCOL.to_bytes(2, "little"), b"hotw\xff\x00"), "255"),
    "half a frame": (encode(0, Hello(1))[:10], ""),
    "a token that nobody was given": (GREETING + b"x" * TOKEN, "a token that nobody was given"),
    "half a token": (GREETING + b"x", ""),
}


WITHOUT_TLS = {
    "a web client": "TLS failed: http request",
    "another protocol": "the receiver speaks no TLS, or another version of it",
    "half a frame": "the receiver speaks no TLS, or another version of it",
}  # what is said of them where there are keys


@pytest.mark.parametrize("keyed", [False, True], ids=["plain", "keys"])
@pytest.mark.parametrize("words", WORDS)
def test_strangers_are_refused_once_and_logged(words, keyed, request, address, caplog):
    said, reason = WORDS[words]
    options = {"keys": request.getfixturevalue("jobs")[0]} if keyed else {}
    reason = WITHOUT_TLS.get(words, reason) if keyed else reason

    def speak(stack):
        for _ in range(3):
            stack.enter_context(contextlib.closing(connected(address))).sendall(said)

    logged = refused(address, speak, caplog, **options)
    assert len(logged) == bool(reason)
    assert all(reason in line and "127.0.0.1" in line for line in logged)


@pytest.mark.parametrize("words", ["half a frame", "half a token"])
def test_who_says_half_of_something_does_not_stay(words, address, monkeypatch):
    for module in (peers_module, network_module):
        monkeypatch.setattr(module, "PATIENCE", 0.0)
    with sender(address, timeout=0.05) as sending, contextlib.closing(connected(address)) as slow:
        slow.sendall(WORDS[words][0])
        with pytest.raises(hw.TransferTimeout):
            sending.send(CONTENT, version=1)
        slow.settimeout(TIMEOUT)
        with contextlib.suppress(ConnectionResetError):
            assert len(slow.recv(4096)) < 4096
            assert slow.recv(4096) == b""
        assert not sending._way._group.peers


def test_who_said_hello_and_drips_the_rest_is_lost_in_its_time_and_the_others_go_on(address, caplog):
    """One sends its answer a byte at a time, and one never shows its token."""
    answer = encode(1, Accept((Wanted(0),)))[:-1]

    def drip():
        with (
            contextlib.closing(NetworkChannel(connected(address), Side.RECEIVER, None)) as slow,
            contextlib.closing(connected(address)) as flow,
        ):
            slow.send(Hello(4711, "slow"))
            while (frame := slow.read()) is None:
                pass
            flow.sendall(GREETING + frame.message.token)
            while (frame := slow.read()) is None:
                pass
            with contextlib.suppress(OSError):
                for byte in itertools.cycle(answer):
                    slow.socket.send(bytes([byte]))

    with sender(address, receivers=2, timeout=1.0, on_lost="drop") as sending:
        threads = [Thread(drip), Thread(take, address)]
        report = sending.send(CONTENT, version=1)
        ((name, why),) = report.lost.items()
        assert name.startswith("slow (process 4711 on 127.0.0.1")
        assert why == "it did not answer the offer within 1 s" or "frame" in why
        assert threads[1].result().keys() == CONTENT.keys()
        threads[0].result()


def test_who_says_hello_and_never_comes_for_its_bytes_does_not_stay(address):
    with sender(address, timeout=0.05) as sending, contextlib.closing(connected(address)) as slow:
        slow.sendall(encode(0, Hello(1)))
        with pytest.raises(hw.TransferTimeout, match=r"0 of 1 receivers"):
            sending.send(CONTENT, version=1)
        (peer,) = sending._way._group.peers
        peer.since -= 60.0
        with pytest.raises(hw.TransferTimeout, match="it never connected for its bytes"):
            sending.send(CONTENT, version=1)
        assert not sending._way._group.peers


def test_a_token_is_good_once(address):
    with contextlib.closing(endpoint_of(address).listen()) as door, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(connected(address))) for _ in range(3)]
        clients[0].sendall(encode(0, Hello(1)))
        guest = admitted(door)
        for client in clients[1:]:
            client.sendall(GREETING + guest.flow.token)
        clients[2].settimeout(0.01)
        for _ in range(1000):
            assert door.admit() is None
            with contextlib.suppress(TimeoutError):
                assert clients[2].recv(1) == b""
                break
        else:
            raise AssertionError("it was not sent away")
        assert guest.flow.attached
        guest.flow.close()
        guest.channel.close()


def test_a_client_of_another_job_or_without_keys_is_told_why(jobs, address, caplog):
    told = {}

    def meet(stack):
        for name, options in {"another": {"keys": jobs[1]}, "none": {}}.items():
            told[name] = Thread(lambda options=options: take(address, **options))
        return told.values()

    logged = refused(address, meet, caplog, keys=jobs[0], timeout=TIMEOUT)
    with pytest.raises(hw.ProtocolError, match=r"the sender's certificate is not taken.*keys= of one job"):
        told["another"].result()
    with pytest.raises(hw.ProtocolError, match="speaks TLS, and this end has no keys"):
        told["none"].result()
    assert len(logged) == 2


@pytest.mark.parametrize("called", ["localhost", "127.0.0.1"])
def test_a_key_for_another_name_is_told_from_one_of_another_job(called, tmp_path, address):
    keys = tmp_path / "keys"
    make_keys(keys, ["trainer"])
    at = address.replace("127.0.0.1", called)
    with sender(address, keys=keys, timeout=0.5) as sending:
        worker = Thread(lambda: take(at, keys=keys))
        with pytest.raises(hw.TransferTimeout, match=r"names this host otherwise .* is for trainer; put that") as there:
            sending.send(CONTENT, version=1)
        with pytest.raises(hw.ProtocolError, match=f"the sender's key is for trainer, not {called}") as here:
            worker.result()
    assert "of one job" not in f"{there.value} {here.value}"
    make_keys(keys, [re.search(r"hotweights keys DIR --hosts (\S+)", str(here.value))[1]])
    with sender(at, keys=keys) as sending:
        worker = Thread(lambda: take(at, keys=keys))
        sending.send(CONTENT, version=1)
        worker.result()


def test_where_the_name_of_a_key_cannot_be_known_the_advice_stands(monkeypatch, tmp_path, address):
    from hotweights.transfer.keys import make_keys
    from hotweights.transfer.tls import Tls

    make_keys(tmp_path / "keys", ["trainer"])
    monkeypatch.setattr(Tls, "_names_shown", lambda tls: [])
    with sender(address, keys=tmp_path / "keys", timeout=0.5) as sending:
        worker = Thread(lambda: take(address, keys=tmp_path / "keys"))
        with pytest.raises(hw.TransferTimeout):
            sending.send(CONTENT, version=1)
        with pytest.raises(hw.ProtocolError, match=r"another name than 127.0.0.1.*--hosts 127.0.0.1"):
            worker.result()


def test_a_sender_without_keys_is_told_to_a_receiver_that_has_some(jobs, address, caplog):
    strangers = []

    def meet(stack):
        strangers.append(Thread(lambda: take(address, keys=jobs[0])))
        return strangers

    logged = refused(address, meet, caplog)
    with pytest.raises(hw.ProtocolError, match="the sender speaks no TLS"):
        strangers[0].result()
    assert len(logged) == 1


def test_a_certificate_that_has_expired_is_refused_at_both_ends(tmp_path, jobs, address):
    make_keys(tmp_path / "old", ["127.0.0.1"], days=0)
    for theirs, ours in ((tmp_path / "old", jobs[0]), (jobs[0], tmp_path / "old")):
        with sender(address, keys=theirs, timeout=0.5) as sending:
            worker = Thread(lambda ours=ours: take(address, keys=ours))
            with pytest.raises(hw.TransferTimeout, match="certificate"):
                sending.send(CONTENT, version=1)
            with pytest.raises(hw.ProtocolError, match="certificate"):
                worker.result()


def test_an_expired_certificate_of_this_job_is_told_what_to_make(tmp_path, address):
    make_keys(tmp_path / "keys", ["trainer"])
    make_keys(tmp_path / "keys", ["127.0.0.1"], days=0)
    with sender(address, keys=tmp_path / "keys", timeout=0.5) as sending:
        worker = Thread(lambda: take(address, keys=tmp_path / "keys"))
        with pytest.raises(hw.TransferTimeout, match=r"certificate.*expired.*; make another: remove HOST\.pem"):
            sending.send(CONTENT, version=1)
        with pytest.raises(hw.ProtocolError, match=r"certificate.*expired.*; make another: remove HOST\.pem"):
            worker.result()


@pytest.mark.parametrize(("dated", "said"), [(2, "not yet valid"), (-900, "expired")])
@pytest.mark.parametrize("end", ["sender", "receiver"])
def test_a_certificate_that_is_not_of_now_is_told_by_both_ends(tmp_path, address, monkeypatch, dated, said, end):
    """As where the clock of the host that made it is wrong. Each end says it of the right certificate."""
    of_now, other = tmp_path / "keys", tmp_path / "other"
    make_keys(of_now, ["127.0.0.1"])
    other.mkdir(mode=0o700)
    for name in ("ca.pem", "ca.key"):
        shutil.copy(of_now / name, other)
    shifted = SimpleNamespace(now=lambda zone: datetime.datetime.now(zone) + datetime.timedelta(days=dated))
    there = SimpleNamespace(datetime=shifted, timedelta=datetime.timedelta, UTC=datetime.UTC)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("hotweights.transfer.keys.datetime", there)
        make_keys(other, ["127.0.0.1"])
    keys = {"sender": of_now, "receiver": of_now} | {end: other}
    with sender(address, keys=keys["sender"], timeout=0.5) as sending:
        worker = Thread(lambda: take(address, keys=keys["receiver"]))
        with pytest.raises(hw.TransferTimeout) as ours:
            sending.send(CONTENT, version=1)
        with pytest.raises(hw.ProtocolError) as theirs:
            worker.result()
    refusing, refused = (theirs, ours) if end == "sender" else (ours, theirs)
    assert f"the {end}'s certificate is not taken: certificate " in str(refusing.value)
    assert said in str(refusing.value)
    assert "by this host's clock, " in str(refusing.value)
    assert "does not take this end's certificate" in str(refused.value)
    assert said in str(refused.value)
    for error in (ours, theirs):
        assert ("set the clocks" if dated > 0 else "make another") in str(error.value)


# Links.


class Kernel:
    """A socket of which the kernel says what a test wants."""

    def __init__(self, retransmits, unacked, last_ack):
        first, fields = [0, 0, retransmits, 0, 0, 0, 0, 0], [0] * 16
        fields[4], fields[12] = unacked, last_ack
        self._said = struct.pack("8B16I", *first, *fields)

    def setsockopt(self, *option):
        pass

    def getpeername(self):
        return "10.0.0.7", 7600

    def setblocking(self, blocking):
        pass

    def getsockopt(self, *option):
        return self._said

    def recvmsg(self, *sizes):
        raise BlockingIOError


@pytest.mark.parametrize(
    ("said", "cut"),
    [
        ((2, 1, 4100), True),
        ((2, 1, 3900), False),  # not yet
        ((0, 1, 9000), False),  # The last was acknowledged long ago, and the next was just sent.
        ((5, 0, 9000), False),  # The other end is busy and takes nothing: its kernel answers, and nothing is sent.
    ],
)
@pytest.mark.parametrize("state", [SessionState.IDLE, SessionState.STREAMING, SessionState.COMMITTED])
def test_a_link_is_cut_when_what_is_sent_is_never_acknowledged(said, cut, state):
    channel = NetworkChannel(Kernel(*said), Side.SENDER, None)
    channel.session.state = state
    channel._moved()
    if cut and state is not SessionState.COMMITTED:  # A decision is under way: the kernel goes on trying.
        with pytest.raises(hw.PeerLost, match=r"the link to 10.0.0.7 is cut: for 4.1 s nothing came back"):
            channel.read()
    else:
        assert channel.read() is None


def test_a_connection_for_bytes_stays_open_between_two_versions(address):
    """Firewalls forget one that is silent: steps may take hours."""
    with sender(address) as sending, receiver(address) as source:
        thread = Thread(lambda: dict(source.tensors()))
        sending.send(CONTENT, version=1)
        thread.result()
        flow = source._connection.slots.flow._socket
        assert flow.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert flow.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


# Addresses.


@pytest.mark.parametrize(
    "wrong", ["tcps://", "tcps://host", "tcps://host:x", "tcps://host:1/path", "tcps://a@b:1", "tcps:"]
)
def test_an_address_that_is_none_is_refused(wrong):
    for end in (hw.Sender, hw.Receiver):
        with pytest.raises(hw.UsageError, match="looks like tcps://trainer:7600"):
            end(wrong)


@pytest.mark.parametrize(
    "open_to_all", ["tcps://10.0.0.7:7600", "tcps://trainer:7600", "tcps://0.0.0.0:7600", "tcps://[::]:1"]
)
def test_without_keys_an_address_that_others_reach_is_refused(open_to_all):
    is_one_host = open_to_all.startswith(("tcps://10", "tcps://trainer"))
    for end in (hw.Sender, hw.Receiver) if is_one_host else (hw.Sender,):
        with pytest.raises(hw.UsageError, match=r"can be reached from other hosts.*hotweights keys DIR --hosts"):
            end(open_to_all)
    if is_one_host:
        hw.Receiver(open_to_all, insecure=True).close()


def test_keys_are_for_the_network():
    for end in (hw.Sender, hw.Receiver):
        with pytest.raises(hw.UsageError, match="are for addresses on the network"):
            end("unix:/tmp/x/y", keys="keys")


def test_a_name_that_means_this_host_only_is_refused(monkeypatch):
    """As Debian has it in /etc/hosts: other hosts would wait in vain."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 1, 6, "", ("127.0.1.1", 7600))])
    with pytest.raises(hw.UsageError, match=rf"trainer is 127.0.1.1 on this host, {socket.gethostname()}, and other"):
        hw.Sender("tcps://trainer:7600", insecure=True)


def test_a_name_that_means_the_receivers_own_host_is_told_at_once(monkeypatch):
    """As where /etc/hosts was copied from the trainer: nobody will ever listen there."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 1, 6, "", ("127.0.1.1", 1))])
    here = socket.gethostname()
    with receiver("tcps://trainer:1", insecure=True) as source:
        with pytest.raises(
            hw.UsageError, match=rf"trainer is 127.0.1.1 on this host, {here}, which is this host itself"
        ):
            source.leases()
        monkeypatch.undo()
        with sender("tcps://0.0.0.0:0", insecure=True) as sending:  # What is reached is taken.
            where = ("127.0.0.1", int(sending.address.rpartition(":")[2]))
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 1, 6, "", where)])
            thread = Thread(lambda: source.connect(TIMEOUT))
            while thread.is_alive():
                assert len(sending.connected) <= 1
            assert thread.result()


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_host_that_cannot_be_reached_is_told_at_once_with_both_names(when, monkeypatch, caplog):
    code = errno.EHOSTUNREACH
    if when == "at once":
        monkeypatch.setattr(socket.socket, "connect_ex", lambda *_: code)
    else:  # As it is where no host answers on the network's own wire.
        monkeypatch.setattr(socket.socket, "connect_ex", lambda *_: errno.EINPROGRESS)

        def unreachable(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(socket.socket, "recvmsg", unreachable, raising=False)
    with (
        receiver("tcps://192.0.2.1:7600", insecure=True, offer_timeout=0.5) as source,
        caplog.at_level(logging.WARNING, "hotweights"),
        pytest.raises(hw.TransferTimeout) as raised,
    ):
        source.leases()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"this host, {socket.gethostname()}, cannot reach 192.0.2.1 (192.0.2.1): No route to host")
    assert when == "at once" or "cannot reach 192.0.2.1" in str(raised.value)


def test_of_several_addresses_of_a_name_the_one_is_found_where_the_sender_listens(address, monkeypatch):
    """A host without IPv6 has the other one first, and the sender's host has both."""
    where = ("127.0.0.1", int(address.rpartition(":")[2]))
    found = [(socket.AF_INET, 1, 6, "", ("127.0.0.2", where[1])), (socket.AF_INET, 1, 6, "", where)]
    with sender(address) as sending:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        worker = Thread(lambda: take("tcps://localhost:1"))
        sending.send(CONTENT, version=1)
        assert worker.result().keys() == CONTENT.keys()


def test_addresses_of_ipv6(tmp_path):
    """With a key for the number, by which both ends call it."""
    make_keys(tmp_path, ["::1"])
    with sender("tcps://[::1]:0", keys=tmp_path, encrypt="all") as sending:
        assert sending.address.startswith("tcps://[::1]:")
        worker = Thread(lambda: take(sending.address, keys=tmp_path))
        assert sending.send(CONTENT, version=1).committed == (f"process {os.getpid()} on ::1",)
        worker.result()
    with sender("tcps://[::]:0", insecure=True) as sending:  # Who comes by IPv4 is called so.
        worker = Thread(lambda: take(sending.address.replace("[::]", "127.0.0.1")))
        assert sending.send(CONTENT, version=1).committed == (f"process {os.getpid()} on 127.0.0.1",)
        worker.result()


@pytest.mark.parametrize("lost", ["the channel", "the flow"])
def test_a_receiver_that_loses_its_sender_says_which_process_on_which_host(lost, address):
    def cut():
        yield "a", CONTENT["a"]
        (peer,) = sending._way._group.peers
        (peer.channel.socket if lost == "the channel" else peer.flow._socket).shutdown(socket.SHUT_RDWR)
        yield "b", CONTENT["b"]

    with sender(address) as sending:
        worker = Thread(take, address)
        with contextlib.suppress(hw.TransferError, hw.Closed):
            sending.send(cut(), version=1, manifest=hw.open(CONTENT).manifest)
        with pytest.raises(hw.TransferError) as raised:
            worker.result()
    assert f"the sender (process {os.getpid()} on 127.0.0.1)" in str(raised.value)


def test_an_address_of_another_host_is_refused():
    with pytest.raises(hw.UsageError, match=r"192\.0\.2\.1 is no address of this host, .*; start it on the"):
        hw.Sender("tcps://192.0.2.1:7600", insecure=True)


def test_a_name_that_nobody_knows(monkeypatch):
    """A receiver waits: the name may be given when the sender starts."""

    def unknown(*_, **__):
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(hw.UsageError, match=f"this host, {socket.gethostname()}, does not know the name trainer"):
        hw.Sender("tcps://trainer:7600", insecure=True)
    with (
        receiver("tcps://trainer:7600", insecure=True, offer_timeout=0.05) as source,
        pytest.raises(hw.TransferTimeout, match="does not know the name trainer"),
    ):
        source.leases()


def test_nobody_listens(address):
    port = address.rpartition(":")[2]
    nobody = rf"nobody listens at 127\.0\.0\.1 \(127\.0\.0\.1\), port {port}: Connection refused"
    with receiver(address, offer_timeout=0.3) as source, pytest.raises(hw.TransferTimeout, match=nobody):
        source.leases()


def test_port_0_is_a_free_one():
    with sender("tcps://127.0.0.1:0") as sending:
        worker = Thread(take, sending.address)
        sending.send(CONTENT, version=1)
        assert worker.result().keys() == CONTENT.keys()


CONNECTING = {
    "receiver": lambda address: hw.Receiver(address, insecure=True),
    "through a relay": lambda address: hw.Receiver(address, insecure=True, relay=True),
    "relay": lambda address: Relay(address, "unix:/tmp/none/socket", insecure=True),
}
LISTENING = {
    "relay": lambda address: Relay("tcps://trainer:7600", ["unix:/tmp/none/socket", address], insecure=True),
    "resolve": lambda address: Resolver(address, insecure=True),
}


@pytest.mark.parametrize("end", [*CONNECTING.values(), *LISTENING.values()], ids=[*CONNECTING, *LISTENING])
@pytest.mark.parametrize("host", ["trainer", "[fd00::1]"])
def test_nobody_can_connect_to_port_0(end, host, monkeypatch):
    """A receiver waited an hour for what could never come."""
    expected = re.escape(f"tcps://{host}:0: nobody can connect to port 0") + ".*" + re.escape(f"tcps://{host}:7600")
    with pytest.raises(hw.UsageError, match=expected):
        end(f"tcps://{host}:0")
    monkeypatch.setenv("HOTWEIGHTS_ADDRESS", f"tcps://{host}:0")
    with pytest.raises(hw.UsageError, match=expected):
        end("env:")


@pytest.mark.parametrize("end", CONNECTING.values(), ids=CONNECTING)
@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_nobody_connects_to_all_addresses_of_a_host(end, host):
    """That would be the receiver's own."""
    with pytest.raises(hw.UsageError, match=r"is where a sender listens.*such as tcps://trainer:7600"):
        end(f"tcps://{host}:7600")


# Bytes.


@given(st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 9000)), max_size=9))
def test_what_is_sent_of_a_slot_covers_its_pieces(pieces):
    found = stretches([Chunk(0, Range(0, size), offset, None) for offset, size in pieces])
    assert found == sorted(found)
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(found))
    wanted = {byte for offset, size in pieces for byte in range(offset, offset + size)}
    assert wanted <= {byte for start, stop in found for byte in range(start, stop)}


@pytest.mark.parametrize("slot", [-1, 2, 0])
def test_a_slot_that_there_is_not_is_refused(slot, address, monkeypatch):
    say = Channel.send

    def lying(channel, message, **options):
        if isinstance(message, Filled):
            far = [Chunk(chunk.tensor, chunk.range, 1 << 20, chunk.digest) for chunk in message.chunks]
            message = Filled(slot, tuple(far), message.fill)
        say(channel, message, **options)

    monkeypatch.setattr(Channel, "send", lying)
    worker = Thread(take, address)
    with sender(address) as sending, pytest.raises(hw.TransferAborted, match="slot"):
        sending.send(CONTENT, version=1)
    with pytest.raises(hw.ProtocolError, match=r"there is no slot|does not fit"):
        worker.result()


def test_a_first_connection_imports_nothing():
    """A child that is forked while another thread imports waits for ever when it needs the same module."""
    script = """
import sys
import hotweights as hw
from hotweights.transfer.relay import Relay

class Finder:
    def find_spec(self, name, path=None, target=None):
        print("imported", name)

relay = Relay(sys.argv[1], "unix:/tmp/none/socket", insecure=True)
sys.meta_path.insert(0, Finder())
relay._pause = lambda seconds: relay.close()  # After the first try.
relay.run()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, free_address()], capture_output=True, text=True, timeout=100 * TIMEOUT
    )
    print(done.stderr)
    assert (done.returncode, done.stdout) == (0, "")
