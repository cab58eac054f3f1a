"""Receivers that the group went on without: what they find later is not for them, and they take nothing of it."""

import threading

import pytest
from ends import TIMEOUT, Thread, receiver, sender
from processes import Tiny, value_of

import hotweights as hw
from hotweights.transfer.channel import Channel
from hotweights.transfer.messages import Accept, End, Filled, Prepared
from hotweights.transfer.roll import Roll


class Standing:
    """Has one thread stand still at a message, until ``go_on`` is set."""

    def __init__(self, monkeypatch, thread, *, before_sent=(), after_sent=(), after_read=()):
        self.stands, self.go_on = threading.Event(), threading.Event()
        self._thread = thread
        send, read = Channel.send, Channel.read

        def sending(channel, message, **options):
            self._stand(isinstance(message, before_sent))
            send(channel, message, **options)
            self._stand(isinstance(message, after_sent))

        def reading(channel):
            frame = read(channel)
            self._stand(frame is not None and isinstance(frame.message, after_read))
            return frame

        monkeypatch.setattr(Channel, "send", sending)
        monkeypatch.setattr(Channel, "read", reading)

    def _stand(self, here):
        if here and threading.current_thread() is self._thread and not self.stands.is_set():
            self.stands.set()
            assert self.go_on.wait(TIMEOUT)


POINTS = {
    "after it accepted": {"after_sent": Accept},
    "when it reads a slot": {"after_read": Filled},
    "when it has read the last": {"after_read": End},
    "before it votes": {"before_sent": Prepared},
}


def follow(live, address):
    """Take versions until one fails, or the third is there."""
    with receiver(address) as source:
        live.load(source)
        while live.version != 3:
            live.update(source)


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("atomic", ["staged", "journal", False])
@pytest.mark.parametrize("point", POINTS, ids=str)
def test_a_dropped_member_takes_no_version_that_goes_on_without_it(point, atomic, digests, address, monkeypatch):
    """It wakes up when the group has the next version, and the slots hold that one's bytes."""
    good, late = hw.LiveModel(Tiny()), hw.LiveModel(Tiny(), atomic=atomic)
    with sender(address, receivers=2, slots=4, timeout=0.3, on_lost="drop", digests=digests) as sending:
        threads = [Thread(follow, good, address), Thread(follow, late, address)]
        sending.send(Tiny(1), version=1)
        standing = Standing(monkeypatch, threads[1], **POINTS[point])
        report = sending.send(Tiny(2), version=2)
        assert standing.stands.is_set()
        assert len(report.committed) == len(report.lost) == 1
        sending.send(Tiny(3), version=3, receivers=1)
        standing.go_on.set()
        threads[0].result()
        with pytest.raises(hw.UpdateAborted):
            threads[1].result()
    assert (good.version, value_of(good.model)) == (3, 3)
    if atomic:
        assert (late.version, value_of(late.model)) == (1, 1)
    else:
        assert "torn" in repr(late)


def test_plain_code_is_told_at_the_end_that_it_was_dropped(address, monkeypatch):
    def take():
        with receiver(address) as source:
            dict(source.tensors())
            return dict(source.tensors())

    with sender(address, receivers=2, timeout=0.3, on_lost="drop") as sending:
        threads = [Thread(take), Thread(take)]
        sending.send(Tiny(1), version=1)
        standing = Standing(monkeypatch, threads[1], before_sent=Prepared)
        sending.send(Tiny(2), version=2)
        standing.go_on.set()
        threads[0].result()
        with pytest.raises(hw.TransferError, match="it did not prepare"):
            threads[1].result()


def test_who_was_dropped_has_no_vote(address, monkeypatch):
    """It voted, broke the protocol, and hears of it before the group has decided: the others take the version."""
    good, bad = hw.LiveModel(Tiny()), hw.LiveModel(Tiny())
    with sender(address, receivers=2, on_lost="drop") as sending:
        threads = [Thread(follow, good, address), Thread(follow, bad, address)]
        sending.send(Tiny(1), version=1)
        standing = Standing(monkeypatch, threads[0], before_sent=Prepared)
        send = Channel.send

        def raving(channel, message, **options):
            send(channel, message, **options)
            if isinstance(message, Prepared) and threading.current_thread() is threads[1]:
                channel.socket.sendall(b"GET / HTTP/1.1\r\n\r\n" + b" " * 20)

        order, strike, say_goodbye = [], Roll.strike, Channel.say_goodbye
        monkeypatch.setattr(Channel, "send", raving)
        monkeypatch.setattr(Roll, "strike", lambda *given: (order.append("struck"), strike(*given))[1])
        monkeypatch.setattr(Channel, "say_goodbye", lambda *given: (order.append("told"), say_goodbye(*given))[1])
        second = Thread(lambda: sending.send(Tiny(2), version=2))
        with pytest.raises(hw.UpdateAborted, match="no frame of hotweights"):
            threads[1].result()
        standing.go_on.set()
        report = second.result()
        assert len(report.committed) == len(report.lost) == 1
        assert order[0] == "struck", "told first, it may end the update for all"
        sending.send(Tiny(3), version=3, receivers=1)
        threads[0].result()
    assert (bad.version, value_of(bad.model)) == (1, 1)
    assert (good.version, value_of(good.model)) == (3, 3)
