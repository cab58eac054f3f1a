"""Damaged, stale and forged frames: refused by both sides with a reason, and the next update succeeds."""

import contextlib
import fcntl
import os
import pickle
import re
import socket

import msgspec
import pytest
import torch
from ends import Thread, receiver, sender
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

import hotweights as hw
from hotweights.ranges import Range
from hotweights.transfer.address import path_of
from hotweights.transfer.channel import Channel
from hotweights.transfer.messages import (
    HEADER,
    MAX_FRAME,
    PROTOCOL,
    Abort,
    Accept,
    Chunk,
    End,
    Filled,
    Hello,
    Offer,
    Prepared,
    Release,
    Wanted,
    Welcome,
    decode,
    encode,
)
from hotweights.transfer.shared_memory import ReadSlots, WriteSlots
from hotweights.transfer.states import SessionState, Side

CONTENT = {"a": torch.arange(5.0), "b": torch.arange(3)}


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (os.abort, ())


FRAMES = {
    "no frame": b"GET / HTTP/1.1\r\n\r\n" + b" " * 20,
    "another protocol": HEADER.pack(b"hotw", PROTOCOL + 1, 0, 0, 0),
    "oversized": HEADER.pack(b"hotw", PROTOCOL, 0, 0, MAX_FRAME + 1),
    "a pickle": HEADER.pack(b"hotw", PROTOCOL, 0, 0, len(pickle.dumps(Evil()))) + pickle.dumps(Evil()),
    "no message": HEADER.pack(b"hotw", PROTOCOL, 0, 0, 3) + b"\xc1\xc1\xc1",
    "of another update": encode(12, Hello(1)),
    "out of turn": encode(0, Prepared()),
    "of the other side": encode(0, Abort("no")),
    "descriptors that did not come": encode(0, Hello(1), 1),
}


def heard(peer):
    """All that the other side says until it hangs up."""
    peer.settimeout(10)
    words = b""
    with contextlib.suppress(ConnectionResetError):
        while raw := peer.recv(65536):
            words += raw
    return words


@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_a_sender_refuses_it_and_serves_the_others(frame, address):
    def take():
        with receiver(address) as source:
            return dict(source.tensors())

    with sender(address) as sending, socket.socket(socket.AF_UNIX) as rogue:
        rogue.connect(path_of(address))
        rogue.sendall(FRAMES[frame])
        taking = Thread(take)
        assert len(sending.send(CONTENT, version=1).committed) == 1
        taking.result()
        assert b"broken" in heard(rogue)


@pytest.mark.parametrize("frame", [*FRAMES, "truncated"], ids=str)
def test_a_receiver_refuses_it_and_takes_the_next(frame, address):
    path = path_of(address)
    os.mkdir(os.path.dirname(path), 0o700)

    def take():
        with receiver(address) as source:
            if frame != "truncated":
                with pytest.raises(hw.ProtocolError):
                    dict(source.tensors())
            return dict(source.tensors())

    with socket.socket(socket.AF_UNIX) as rogue:
        rogue.bind(path)
        rogue.listen()
        taking = Thread(take)
        rogue.settimeout(10)
        connected, _ = rogue.accept()
        rogue.close()
        with connected:
            connected.sendall(FRAMES.get(frame, encode(0, Welcome(1, 4096, 1.0, 0), 1)[:-2]))
            if frame != "truncated":
                heard(connected)
    with sender(address) as sending:
        sending.send(CONTENT, version=1)
    assert taking.result()["a"].tolist() == [0, 1, 2, 3, 4]


def test_both_ends_name_both_protocols(address):
    """A worker of another version: the trainer is told why nobody came, and the worker why it was sent away."""
    both = f"protocol {PROTOCOL + 1}, this one {PROTOCOL}"
    with sender(address, timeout=0.1) as sending, socket.socket(socket.AF_UNIX) as other:
        other.connect(path_of(address))
        other.sendall(FRAMES["another protocol"])
        with pytest.raises(hw.TransferTimeout) as told:
            sending.send(CONTENT, version=1)
        assert both in str(told.value)
        assert both.encode() in heard(other)


STRUCT = re.compile(r"\w+\(\w+=")  # Range(start=0, ...): no message shows how our classes look inside


def lie(*chunks, slot=0):
    """``a`` has 20 bytes, ``b`` has 24; neither has digests."""
    return Filled(slot, tuple(Chunk(number, Range(*range), offset, None) for number, range, offset in chunks), 0)


LIES = {
    "another slot": (lie((0, (0, 20), 0), slot=7), "there is no slot 7"),
    "a negative slot": (lie((0, (0, 20), 0), slot=-1), "there is no slot -1"),
    "an unknown tensor": (lie((9, (0, 20), 0)), "not asked for"),
    "past the slot": (lie((0, (0, 20), 4096)), "does not lie in its slot"),
    "before the slot": (lie((0, (0, 20), -64)), "does not lie in its slot"),
    "unaligned": (lie((0, (0, 20), 4)), "does not lie in its slot"),
    "past the tensor": (lie((0, (0, 24), 0)), "it has 20 bytes"),
    "nothing": (lie(), "nothing in it"),
    "no bytes": (lie((0, (0, 0), 0)), "it has 20 bytes"),
    "negative": (lie((0, (0, -4), 0)), "it has 20 bytes"),
    "runs past the tensor": (lie((0, (0, 4, 3, 10), 0)), "it has 20 bytes"),
    "runs into each other": (lie((0, (0, 8, 2, 4), 0)), "it has 20 bytes"),
    "no runs": (lie((0, (0, 8, 0, 8), 0)), "it has 20 bytes"),
    "interleaved": (lie((0, (0, 4), 0), (1, (0, 24), 64)), "the rest of it was to come next"),
    "a part twice": (lie((0, (0, 12), 0), (0, (8, 12), 64)), "came twice"),
    "runs twice": (lie((0, (0, 4, 2, 8), 0), (0, (8, 4), 64)), "came twice"),
    "twice": (lie((0, (0, 20), 0), (0, (0, 20), 0)), "not asked for"),
    "a digest that was not promised": (Filled(0, (Chunk(0, Range(0, 20), 0, 5),), 0), "a digest came"),
    "the end too early": (End(), "(?s)a: it never came.*b: it never came"),
}


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_a_receiver_reads_no_byte_that_it_was_not_promised(lie, address, monkeypatch):
    say, lies = Channel.send, [LIES[lie][0]]

    def lying(channel, message, **options):
        say(channel, lies.pop() if isinstance(message, Filled) and lies else message, **options)

    def take():
        with receiver(address) as source:
            with pytest.raises(hw.ProtocolError, match=LIES[lie][1]) as told:
                dict(source.tensors())
            assert not STRUCT.search(str(told.value))
            return dict(source.tensors())

    taking = Thread(take)
    with sender(address, digests=False) as sending:
        with monkeypatch.context() as patch:
            patch.setattr(Channel, "send", lying)
            with pytest.raises(hw.TransferError):  # A sender that lies confuses itself too.
                sending.send(CONTENT, version=1)
        sending.send(CONTENT, version=2)
    assert taking.result()["b"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "wanted",
    [
        (Wanted(5),),
        (Wanted(-1),),
        (Wanted(0), Wanted(0)),
        (Wanted(0, (Range(0, 24),)),),
        (Wanted(0, (Range(-4, 8),)),),
        (Wanted(0, (Range(0, 0),)),),
        (Wanted(0, (Range(0, 12), Range(8, 4))),),
        (Wanted(0, (Range(0, 4, 3, 10),)),),
        (Wanted(0, (Range(0, 4, 2, 8), Range(8, 4))),),
        (Wanted(0, (Range(0, 4, 2**62, 2**62),)),),
    ],
)
def test_a_sender_refuses_requests_for_what_it_did_not_offer(wanted, address, monkeypatch):
    say = Channel.send

    def lying(channel, message, **options):
        say(channel, Accept(wanted) if isinstance(message, Accept) else message, **options)

    def take():
        with receiver(address) as source, pytest.raises(hw.TransferError):
            dict(source.tensors())

    monkeypatch.setattr(Channel, "send", lying)
    taking = Thread(take)
    with (
        sender(address) as sending,
        pytest.raises(
            hw.TransferAborted, match=r"were not offered, or one twice|bytes of a: .* there are not, or some twice"
        ) as told,
    ):
        sending.send(CONTENT, version=1)
    assert not STRUCT.search(str(told.value))
    taking.result()


def test_a_stale_release_ends_the_connection_and_names_both_updates(address, monkeypatch):
    say = Channel.send

    def late(channel, message, **options):
        if isinstance(message, Release):
            channel.socket.sendall(encode(channel.session.update - 1, message))
        else:
            say(channel, message, **options)

    def take():
        with receiver(address) as source, pytest.raises(hw.PeerLost, match="stale"):
            dict(source.tensors())

    monkeypatch.setattr(Channel, "send", late)
    taking = Thread(take)
    with sender(address) as sending, pytest.raises(hw.TransferAborted, match=r"'release' of update \d+ is stale"):
        sending.send(CONTENT, version=1)
    taking.result()


def channel(state=SessionState.CONNECTED, side=Side.SENDER):
    ours, theirs = socket.socketpair()
    made = Channel(ours, side)
    made.session.state = state
    return made, theirs


@examples(200)
@given(
    raw=st.binary(max_size=200), header=st.booleans(), state=st.sampled_from(SessionState), side=st.sampled_from(Side)
)
def test_random_bytes_give_our_errors_and_nothing_else(raw, header, state, side):
    made, theirs = channel(state, side)
    with contextlib.closing(made), theirs:
        theirs.sendall((HEADER.pack(b"hotw", PROTOCOL, 0, 0, len(raw)) if header else b"") + raw)
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(hw.ProtocolError, hw.PeerLost):
            for _ in range(3):
                assert made.read() is not None


@examples(200)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(), st.lists))
def test_random_content_gives_our_errors_and_nothing_else(content):
    with contextlib.suppress(hw.ProtocolError), contextlib.suppress(OverflowError):
        decode(msgspec.msgpack.encode(content))


@pytest.mark.parametrize("cut", [1, HEADER.size - 1, HEADER.size, -1])
def test_a_frame_cut_short_is_a_lost_peer(cut):
    made, theirs = channel()
    with contextlib.closing(made):
        with theirs:
            theirs.sendall(encode(0, Hello(1))[:cut])
        with pytest.raises(hw.PeerLost, match="in the middle of a frame"):
            made.read()


def test_a_frame_may_come_byte_by_byte_and_two_at_once():
    made, theirs = channel(SessionState.STREAMING)
    made.session.update = 3
    with contextlib.closing(made), theirs:
        for byte in encode(3, Release((1,))):
            assert made.read() is None
            theirs.sendall(bytes([byte]))
        theirs.sendall(encode(3, Release((2,))) + encode(3, Release((3,))))
        assert [made.read().message.slots for _ in range(3)] == [(1,), (2,), (3,)]
        assert made.read() is None


def test_descriptors_that_nobody_asked_for_are_closed():
    made, theirs = channel()
    before = len(os.listdir("/proc/self/fd"))
    with contextlib.closing(made), theirs:
        for _ in range(12):
            socket.send_fds(theirs, [b"x"], [0])
            try:
                made.read()
            except hw.ProtocolError as error:
                made.say_goodbye(str(error))
                break
        else:
            raise AssertionError("it takes any number of them")
    assert len(os.listdir("/proc/self/fd")) <= before


def test_an_offer_is_no_larger_than_a_frame(address):
    source = receiver(address)
    coming = Thread(lambda: source.manifest)
    with sender(address) as sending, pytest.raises(hw.UsageError, match="too large"):
        sending.send({"x" * (MAX_FRAME + 1): torch.zeros(1)}, version=1)
    source.close()
    with pytest.raises(hw.Closed):
        coming.result()


@pytest.mark.parametrize(
    "tensors",
    [
        (("a", "float32", (1,)), ("a", "float32", (1,))),
        (("a", "no_dtype", (1,)),),
        (("a", "Tensor", (1,)),),
        (("a", "float32", (-1,)),),
        (("a", "float32", (2**62, 2**62)),),
    ],
)
def test_an_impossible_offer_is_refused(tensors, address, monkeypatch):
    say = Channel.send

    def lying(channel, message, **options):
        say(channel, Offer(1, True, tensors) if isinstance(message, Offer) else message, **options)

    def take():
        with receiver(address) as source, pytest.raises(hw.ProtocolError):
            return source.manifest

    monkeypatch.setattr(Channel, "send", lying)
    taking = Thread(take)
    with sender(address) as sending, pytest.raises(hw.TransferAborted, match="the offer is broken"):
        sending.send(CONTENT, version=1)
    taking.result()


def test_slots_are_sealed_and_read_only_for_receivers():
    written = WriteSlots(2, 4096)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(written.descriptor, 0)
        assert written.write_protected
        with pytest.raises(PermissionError):
            os.write(written.descriptor, b"x")
        read = ReadSlots(written.descriptor, 2, 4096)
        written.memories[1][5] = 9
        assert read.memories[1][5] == 9
        with pytest.raises(hw.ProtocolError, match=r"the memory has \d+ bytes"):
            ReadSlots(written.descriptor, 999, 4096)
        del read
    finally:
        written.close()


def test_slots_that_could_shrink_are_refused():
    for flags in (os.MFD_ALLOW_SEALING, 0):
        descriptor = os.memfd_create("hotweights-test", flags)
        with pytest.raises(hw.ProtocolError, match="not sealed against shrinking"):
            ReadSlots(descriptor, 1, 4096)
        os.close(descriptor)
    left, right = os.pipe()
    with pytest.raises(hw.ProtocolError, match="no sealed memory"):
        ReadSlots(left, 1, 4096)
    os.close(left)
    os.close(right)


def test_a_kernel_without_the_newest_seal_is_served_and_said(monkeypatch, caplog):
    real = fcntl.fcntl

    def old(descriptor, command, argument=0):
        if command == fcntl.F_ADD_SEALS and argument & 0x10:
            raise OSError(22, "Invalid argument")
        return real(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", old)
    written = WriteSlots(1, 4096)
    assert not written.write_protected
    assert "F_SEAL_FUTURE_WRITE needs Linux 5.1" in caplog.text
    ReadSlots(written.descriptor, 1, 4096)
    written.close()
