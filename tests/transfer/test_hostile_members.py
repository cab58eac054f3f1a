"""Members that flood, reconnect, never answer, or decide for all: they are ended and named, and nobody else is lost."""

import contextlib
import errno
import fcntl
import itertools
import os
import socket
import threading
import time
import types

import pytest
import torch
from ends import TIMEOUT, Thread, receiver, sender
from interrupting import Interrupting
from processes import Child, Tiny, value_of

import hotweights as hw
from hotweights import signals
from hotweights.transfer.address import Listener, path_of
from hotweights.transfer.channel import Channel
from hotweights.transfer.decision import Decision
from hotweights.transfer.endpoint import endpoint_of
from hotweights.transfer.messages import (
    HEADER,
    MAX_SMALL,
    PROTOCOL,
    Abort,
    Accept,
    Filled,
    Hello,
    Offer,
    Refuse,
    Release,
    Wanted,
    Welcome,
    encode,
)
from hotweights.transfer.outbound import Outbound
from hotweights.transfer.peers import Peer, PeerGroup
from hotweights.transfer.shared_memory import WriteSlots
from hotweights.transfer.states import SessionState, Side
from hotweights.transfer.waits import Waker

CONTENT = {"a": torch.arange(5.0), "b": torch.arange(3)}


class Rogue:
    """A member that says what a test wants, to a sender that is there."""

    def __init__(self, address):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT)
        self._socket.connect(path_of(address))
        self._channel = Channel(self._socket, Side.RECEIVER)
        self._socket.settimeout(TIMEOUT)
        self._channel.send(Hello(1))
        self._channel.session.came = lambda kind, update: None  # It does not look what it is told.
        self.update = 0

    def hear(self, kind):
        """Read on until a message of this kind."""
        while True:
            frame = self._channel.read()
            assert frame is not None
            self.update = frame.update
            for descriptor in frame.descriptors:
                os.close(descriptor)
            if isinstance(frame.message, kind):
                return frame.message

    def say(self, message):
        """Whether the table allows it or not."""
        self._socket.sendall(encode(self.update, message))

    def heard(self):
        """All that it is told until the other side hangs up."""
        words = b""
        with contextlib.suppress(ConnectionResetError):
            while raw := self._socket.recv(65536):
                words += raw
        return words

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._channel.close()


def take(address, **options):
    with receiver(address, **options) as source:
        return dict(source.tensors())


# Frames without end.


@pytest.mark.parametrize("slots", [(), (0, 0), (1,), (-1,)])
def test_a_member_that_releases_what_it_does_not_hold_is_ended(slots, address):
    def work():
        with Rogue(address) as rogue:
            rogue.hear(Offer)
            rogue.say(Accept((Wanted(0),)))
            rogue.hear(Filled)
            rogue.say(Release(slots))
            return rogue.heard()

    with sender(address) as sending:
        member = Thread(work)
        with pytest.raises(hw.TransferAborted, match=r"released the slots \[.*; it held \[0\]"):
            sending.send(CONTENT, version=1)
    assert b"broken" in member.result()


def test_nothing_is_said_twice_to_keep_a_sender_busy(address):
    def work():
        with Rogue(address) as rogue:
            rogue.hear(Offer)
            offered.wait(TIMEOUT)
            rogue.hear(Abort)
            for _ in range(2):
                rogue.say(Refuse(("no",)))
            return rogue.heard()

    def refuse():
        with receiver(address) as source:
            assert source.manifest
            offered.set()
            source.refuse(ValueError("no"))

    offered = threading.Event()
    with sender(address, receivers=2) as sending:
        threads = [Thread(work), Thread(refuse)]
        with pytest.raises(hw.TransferAborted, match="ValueError: no"):
            sending.send(CONTENT, version=1)
    assert b"said 'refuse' twice" in threads[0].result()
    threads[1].result()


# Connections without end.


@pytest.fixture
def reconnecting(monkeypatch):
    """Somebody connects and goes, as often as anybody looks; the list is of the descriptors open then."""
    descriptors = []

    def accept(listener):
        descriptors.append(len(os.listdir("/proc/self/fd")))
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        theirs.close()
        return ours

    monkeypatch.setattr(Listener, "accept", accept)
    return descriptors


def test_who_connects_and_goes_does_not_hold_a_sender_past_its_time(reconnecting, address):
    with sender(address, timeout=0.2) as sending:
        with pytest.raises(hw.TransferTimeout, match="0 of 1 receivers") as told:
            Thread(lambda: sending.send(CONTENT, version=1)).result()
        assert 0 < len(told.value.problems) <= 20
    assert max(reconnecting) - reconnecting[0] < 40


def test_who_connects_and_goes_does_not_keep_a_sender_from_being_closed(reconnecting, address):
    sending = sender(address, timeout=float("inf"))
    thread = Thread(lambda: sending.send(CONTENT, version=1))
    Thread(sending.close).result()
    with pytest.raises(hw.Closed):
        thread.result()


def test_who_connects_and_says_nothing_makes_room_for_others(address):
    path = path_of(address)
    with sender(address) as sending, contextlib.ExitStack() as stack:
        for _ in range(100):
            silent = stack.enter_context(socket.socket(socket.AF_UNIX))
            silent.connect(path)
        worker = Thread(take, address)
        sending.send(CONTENT, version=1)
        assert worker.result().keys() == CONTENT.keys()
        assert len(sending._way._group.peers) <= 64 + 1


def test_all_that_wait_take_part_however_few_are_needed(address):
    slots = WriteSlots(1, 4096)
    group = PeerGroup([endpoint_of(address)], slots, TIMEOUT)
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(40):
                stack.enter_context(Rogue(address))
            assert len(group.gather(1)) == 40
    finally:
        group.close()
        slots.close()


def test_a_sender_without_descriptors_says_so(address, monkeypatch):
    def accept(listener):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Listener, "accept", accept)
    with sender(address) as sending, pytest.raises(hw.TransferError, match="Too many open files"):
        sending.send(CONTENT, version=1)


@pytest.mark.parametrize("state", [SessionState.CONNECTED, SessionState.GREETED, SessionState.IDLE])
def test_who_was_asked_nothing_can_say_little(state):
    ours, theirs = socket.socketpair()
    channel = Channel(ours, Side.SENDER)
    channel.session.state = state
    with contextlib.closing(channel), theirs:
        theirs.sendall(HEADER.pack(b"hotw", PROTOCOL, 0, 0, MAX_SMALL + 1))
        with pytest.raises(hw.ProtocolError, match="too large"):
            channel.read()


def test_a_member_sends_no_descriptors_for_a_sender_to_keep(address):
    with sender(address) as sending, socket.socket(socket.AF_UNIX) as rogue:
        rogue.connect(path_of(address))
        socket.send_fds(rogue, [encode(0, Hello(1))[:3]], [rogue.fileno()])
        worker = Thread(take, address)
        sending.send(CONTENT, version=1)
        worker.result()
        rogue.settimeout(TIMEOUT)
        assert b"more descriptors came" in rogue.recv(65536)


# The time of others.


def test_a_good_member_is_not_lost_while_its_sender_waits_for_a_bad_one(address):
    """It waits longer than its own time, which is shorter than the sender's patience with somebody else."""
    content = {f"w{number}": torch.full((1000,), float(number)) for number in range(8)}

    def hold():
        with Rogue(address) as rogue:
            rogue.hear(Offer)
            rogue.say(Accept(tuple(map(Wanted, range(8)))))
            rogue.heard()

    with sender(address, receivers=2, timeout=0.8, on_lost="drop") as sending:
        threads = [Thread(hold), Thread(lambda: take(address, timeout=0.4))]
        report = sending.send(content, version=1)
    assert list(report.lost.values()) == ["it did not release a slot within 0.8 s"]
    assert threads[1].result().keys() == content.keys()
    threads[0].result()


def test_every_member_has_a_time_of_its_own(monkeypatch):
    now, lost = [100.0], []
    good, bad = (Peer(None, name, place) for place, name in enumerate(("good", "bad")))
    waiting = [good, bad]

    def look(seconds=0.0):
        if now[0] == 100:
            now[0] = good.moved = 109.0  # It says something, and is not done yet.
            return
        now[0] += seconds
        if now[0] > 110:
            waiting.remove(good)

    def lose(peer, reason):
        lost.append((peer.name, now[0]))
        waiting.remove(peer)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    outbound = types.SimpleNamespace(_timeout=10.0, _lose=lose, _look=look, _waited={})
    Outbound._wait(outbound, lambda: list(waiting), "do it")
    assert lost == [("bad", 110.0)]


def test_who_answered_while_its_sender_stood_still_is_not_lost(monkeypatch):
    now, peer = [100.0], Peer(None, "good", 0)
    waiting, looks = [peer], []

    def look(seconds=0.0):
        looks.append(seconds)
        if len(looks) == 1:
            now[0] += 1000  # It was stopped, and the poll ended without having looked.
        else:
            waiting.clear()  # The answer was there.

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lost = []
    outbound = types.SimpleNamespace(
        _timeout=10.0, _lose=lambda peer, reason: (lost.append(reason), waiting.clear()), _look=look, _waited={}
    )
    Outbound._wait(outbound, lambda: list(waiting), "do it")
    assert (lost, looks) == ([], [10.0, 0.0])


# The decision of others.


@pytest.mark.parametrize("on_lost", ["abort", "drop"])
@pytest.mark.parametrize("decision", Decision)
def test_who_writes_the_decision_unasked_decides_nothing_and_is_named(decision, on_lost, address):
    live, offered = hw.LiveModel(Tiny()), threading.Event()

    def cheat():
        with receiver(address) as source:
            dict(source.tensors())
            assert source.manifest
            assert offered.wait(TIMEOUT)
            source._inbound.member._ballot.decide(decision)
            with pytest.raises(hw.TransferAborted):
                dict(source.tensors())

    def follow():
        with receiver(address) as source:
            live.load(source)
            assert source.manifest
            offered.set()  # An offer that was given up before anybody looked at it is not seen.
            with pytest.raises(hw.UpdateAborted):
                live.update(source)

    with sender(address, receivers=2, on_lost=on_lost) as sending:
        threads = [Thread(cheat), Thread(follow)]
        sending.send(Tiny(1), version=1)
        name = rf"process {os.getpid()}( #2)?"
        with pytest.raises(hw.TransferAborted, match=f"{name} or {name}: it wrote the decision without being asked"):
            sending.send(Tiny(2), version=2)
        for thread in threads:
            thread.result()
    assert (live.version, value_of(live.model)) == (1, 1)


# One thread closes, another uses.


@pytest.mark.parametrize("use", [Waker.wake, Waker.close])
def test_a_descriptor_is_not_let_go_while_another_thread_writes_to_it(use, monkeypatch):
    waker, write = Waker(), os.eventfd_write

    def writing(descriptor, count):
        other = threading.Thread(target=waker.close)
        other.start()
        other.join(0.05)  # It ends here only if nothing holds it.
        write(descriptor, count)
        started.append(other)

    started = []
    monkeypatch.setattr(os, "eventfd_write", writing)
    waker.wake()
    started[0].join(TIMEOUT)
    use(waker)


# Interrupted while a frame is said.


def test_a_frame_that_was_interrupted_is_sent_once_and_never_lost():
    """A signal at every line of ``send`` and ``flush``; frames are larger than what a socket takes at once."""
    frames = [Filled(number, (), number) for number in range(3)] + [Refuse(("x" * 300_000,))]
    for at in itertools.count():
        ours, theirs = socket.socketpair()
        with contextlib.closing(Channel(ours, Side.SENDER)) as channel, theirs:
            theirs.setblocking(False)
            said, raw = [], b""
            channel.session.sent = lambda kind, update, said=said: said.append(kind)

            @signals.watched
            def say(at=at, channel=channel):
                with Interrupting(at) as interrupting:
                    for message in frames:
                        channel.send(message, update=1)
                return interrupting

            try:
                interrupting = say()
            except KeyboardInterrupt:
                interrupting = None
            while True:
                channel.flush()
                try:
                    raw += theirs.recv(1 << 20)
                except BlockingIOError:
                    break
        assert raw == b"".join(encode(1, message) for message in frames[: len(said)]), f"at line {at}"
        assert len(said) == len(frames), "a signal that waits is raised behind the last of them"
        if interrupting is not None:
            assert interrupting.where is None
            break
    assert at > 40


# Descriptors that are something else.


def wrong_descriptors(tmp_path):
    """What a hostile sender may send for memory; each can be closed."""
    (tmp_path / "file").write_bytes(bytes(1 << 16))
    reading, writing = os.pipe()
    os.close(writing)
    small = WriteSlots(1, 4096)
    unsealed = os.memfd_create("hotweights-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 1 << 20)
    holes = os.memfd_create("hotweights-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(holes, 1 << 20)
    fcntl.fcntl(holes, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    try:
        yield "holes", holes, "only 0 are there"
        yield "a directory", os.open(tmp_path, os.O_RDONLY), "no sealed memory"
        yield "a file", os.open(tmp_path / "file", os.O_RDWR), "no sealed memory|not sealed"
        yield "a pipe", reading, "no sealed memory"
        yield "unsealed", unsealed, "not sealed against shrinking"
        yield "small", os.dup(small.descriptor), "the memory has"
    finally:
        small.close()


def test_memory_that_is_none_is_refused(address, tmp_path):
    path = path_of(address)
    os.mkdir(os.path.dirname(path), 0o700)
    for name, descriptor, said in wrong_descriptors(tmp_path):
        with socket.socket(socket.AF_UNIX) as rogue:
            rogue.bind(path)
            rogue.listen()
            rogue.settimeout(TIMEOUT)
            worker = Thread(take, address)
            connected, _ = rogue.accept()
            with connected:
                socket.send_fds(connected, [encode(0, Welcome(9, 4096, 1.0, 0), 1)], [descriptor])
                with pytest.raises(hw.ProtocolError, match=said):
                    worker.result()
        os.close(descriptor)
        os.unlink(path)
        assert name


@pytest.mark.parametrize(
    ("count", "said"), [(0, "came without its descriptor"), (9, "descriptors came"), (200, "lost")]
)
def test_a_receiver_keeps_no_descriptors_that_are_too_many_or_none(count, said):
    ours, theirs = socket.socketpair()
    with contextlib.closing(Channel(ours, Side.RECEIVER)) as channel, theirs:
        channel.send(Hello(1))
        socket.send_fds(theirs, [encode(0, Welcome(1, 4096, 1.0, 0), 1)], [theirs.fileno()] * count)
        with pytest.raises(hw.ProtocolError, match=said):
            channel.read()


@pytest.mark.parametrize("kind", ["a pipe", "read-only", "a place beyond the roll"])
def test_a_ballot_that_is_none_is_refused(kind, address):
    path = path_of(address)
    os.mkdir(os.path.dirname(path), 0o700)
    reading, writing = os.pipe()
    memory = os.memfd_create("hotweights-test", os.MFD_ALLOW_SEALING)
    read_only = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
    slots = WriteSlots(1, 4096)
    place = 1024 if kind == "a place beyond the roll" else 0
    try:
        with socket.socket(socket.AF_UNIX) as rogue:
            rogue.bind(path)
            rogue.listen()
            rogue.settimeout(TIMEOUT)
            worker = Thread(take, address)
            connected, _ = rogue.accept()
            with connected:
                socket.send_fds(connected, [encode(0, Welcome(1, 4096, 1.0, place), 1)], [slots.descriptor])
                ballot = reading if kind == "a pipe" else read_only
                with contextlib.suppress(BrokenPipeError):
                    socket.send_fds(connected, [encode(1, Offer(1, False, ()), 1)], [ballot])
                with pytest.raises(hw.ProtocolError, match=r"ballot|place 1024"):
                    worker.result()
    finally:
        slots.close()
        for descriptor in (reading, writing, memory, read_only):
            os.close(descriptor)


# Forked children.


def test_a_forked_child_is_told_that_neither_end_is_its_own(address):
    def use(pipe):
        said = []
        for work in (lambda: sending.send(CONTENT, version=1), lambda: source.manifest):
            with pytest.raises(hw.UsageError, match=r"is process \d+'s, which forked this one") as told:
                work()
            said.append(str(told.value))
        sending.close()
        source.close()
        pipe.send(said)

    with sender(address) as sending, receiver(address) as source:
        with sending._sending, Child(use) as child:  # As if a thread of the parent were sending.
            assert len(child.heard()) == 2
        worker = Thread(lambda: dict(source.tensors()))
        sending.send(CONTENT, version=1)
        assert worker.result().keys() == CONTENT.keys()
