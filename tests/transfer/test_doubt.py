"""Who voted and cannot hear the decision: it serves the version before, says so, and the next lead ends it."""

import contextlib
import os
import threading
from types import SimpleNamespace

import pytest
from ends import TIMEOUT, Thread, receiver, sender
from processes import Tiny, value_of
from typer.testing import CliRunner

import hotweights as hw
from hosts import free_address
from hotweights.cli import app
from hotweights.live.state import State
from hotweights.transfer.channel import Channel
from hotweights.transfer.decision import Decision, Known
from hotweights.transfer.doubts import Doubt, past_of
from hotweights.transfer.messages import (
    HEADER,
    MAX_SMALL,
    Accept,
    Account,
    Commit,
    Crew,
    Offer,
    Past,
    Prepared,
    Seat,
    Verdict,
    decode,
    encode,
)
from hotweights.transfer.outbound import Outbound
from hotweights.transfer.peers import PeerGroup
from hotweights.transfer.registers.register import SharedRecord
from hotweights.transfer.relay import Relay
from hotweights.transfer.states import SessionState


@pytest.fixture
def address():
    return free_address()


class Cut:
    """Cuts connections of this process where a sender is to say commit to some of its receivers."""

    def __init__(self, monkeypatch, *numbers):
        self.armed, self._say, self._numbers, self._said = False, Channel.send, numbers, 0
        cut = self

        def dying(channel, message, **options):
            if isinstance(message, Commit) and cut.armed:
                number, cut._said = cut._said, cut._said + 1
                if number in cut._numbers:
                    channel.socket.shutdown(2)
            cut._say(channel, message, **options)

        monkeypatch.setattr(Channel, "send", dying)


class Worker:
    """Follows a sender in a thread, and notes what is live after each attempt, and the states in between."""

    def __init__(self, address, *, last=3, **options):
        self.live, self.seen, self.errors = hw.LiveModel(Tiny()), [], []
        self.source = receiver(address, **options)
        self._last = last
        self.thread = Thread(self._run)

    def _run(self):
        with self.source as source:
            while self.live.version != self._last:
                try:
                    self.live.load(source) if self.live.version is None else self.live.update(source)
                except hw.UpdateAborted as error:
                    self.errors.append(error)
                self.seen.append((self.live.version, value_of(self.live.model), self.live.state))

    @property
    def versions(self):
        return [version for version, _, _ in self.seen]

    def in_state(self, state):
        """Wait until its live model is in this state."""
        turn = threading.Event()
        for _ in range(int(TIMEOUT * 100)):
            if self.live.state is state:
                return
            turn.wait(0.01)
        raise AssertionError(f"it is {self.live.state.value}")


def sent(sending, version):
    try:
        return len(sending.send(Tiny(version), version=version).committed)
    except hw.TransferIncomplete as error:
        return len(error.committed)


def test_the_same_sender_tells_what_it_decided(address, monkeypatch):
    cut = Cut(monkeypatch, 0)
    worker = Worker(address)
    with sender(address) as sending:
        sent(sending, 1)
        cut.armed = True
        assert sent(sending, 2) == 0
        cut.armed = False
        worker.in_state(State.IN_DOUBT)
        assert worker.live.version == 1
        assert worker.source.in_doubt
        with worker.live.serving() as version:
            assert version == 1
        assert len(sending.connected) <= 1
        assert sent(sending, 3) == 1
    worker.thread.result()
    assert worker.seen == [(number, number, State.SERVING) for number in (1, 2, 3)]


@pytest.mark.parametrize(("heard", "taken"), [((1,), True), ((0,), True), ((), False)])
def test_the_next_sender_commits_if_one_has_and_aborts_if_none_of_all_has(heard, taken, address, monkeypatch):
    cut = Cut(monkeypatch, *({0, 1} - {*heard}))
    workers = [Worker(address) for _ in range(2)]
    with sender(address, receivers=2) as first:
        sent(first, 1)
        cut.armed = True
        assert sent(first, 2) == len(heard)
    cut.armed = False
    with sender(address, receivers=2) as second:
        report = second.send(Tiny(3), version=3)
    for worker in workers:
        worker.thread.result()
        assert worker.versions == ([1, 2, 3] if taken else [1, 1, 3])
        assert not any(isinstance(error.__cause__, hw.TransferInDoubt) for error in worker.errors)
    assert not report.warnings


def test_the_next_sender_waits_for_all_and_then_says_who_did_not_come(address, monkeypatch):
    """It does not guess: the version before stays live, by name in doubt, until the next one is taken."""

    def vote_and_leave():
        with receiver(address, name="gone", timeout=0.1) as source:
            assert value_of_all(source) == {1}
            with pytest.raises(hw.TransferInDoubt):
                value_of_all(source)

    cut = Cut(monkeypatch, 0, 1)
    stays, leaves = Worker(address, name="stays"), Thread(vote_and_leave)
    with sender(address, receivers=2) as first:
        sent(first, 1)
        cut.armed = True
        assert sent(first, 2) == 0
        cut.armed = False
        leaves.result()
    with sender(address, timeout=0.5) as second:
        report = second.send(Tiny(3), version=3)
    stays.thread.result()
    assert stays.versions == [1, 1, 3]
    assert stays.seen[1][2] is State.IN_DOUBT
    assert isinstance(stays.errors[0].__cause__, hw.TransferInDoubt)
    (warning,) = report.warnings
    assert "version 2: 1 in doubt; waiting for gone" in warning


def value_of_all(source):
    """The values of all that comes."""
    return {value for _, tensor in source.tensors() for value in tensor.float().unique().tolist()}


def test_who_is_not_told_in_time_keeps_its_version_and_is_in_doubt_by_name(address, monkeypatch):
    cut = Cut(monkeypatch, 0)
    worker = Worker(address, timeout=0.3)
    with sender(address) as sending:
        sent(sending, 1)
        cut.armed = True
        assert sent(sending, 2) == 0
        cut.armed = False
        while not worker.errors:
            threading.Event().wait(0.01)
        assert worker.live.state is State.IN_DOUBT
        assert (worker.live.version, value_of(worker.live.model)) == (1, 1)
        assert isinstance(worker.errors[0].__cause__, hw.TransferInDoubt)
        assert "whether the group took it is not known here" in str(worker.errors[0])
        sent(sending, 3)
    worker.thread.result()
    assert worker.live.state is State.SERVING


@pytest.mark.parametrize("heard", [0, 1])
def test_workers_behind_a_relay_are_told_by_the_next_lead_through_the_next_relay(heard, address, tmp_path, monkeypatch):
    """The relay has lost its sender, and knows nothing; the worker beside it has heard the decision, or has not."""
    local = f"unix:{tmp_path / 'run' / 'socket'}"
    behind = [Worker(local) for _ in range(2)]
    beside = Worker(address)
    cut = Cut(monkeypatch)

    @contextlib.contextmanager
    def relaying():
        with Relay(address, local, timeout=TIMEOUT) as relay:
            thread = Thread(relay.run)
            try:
                yield
            finally:
                relay.close()
                thread.result()

    def dying(channel, message, **options):
        # The relay's connection, and that of the worker beside it where nobody hears the decision.
        if isinstance(message, Commit) and cut.armed and not channel.shares and (not heard or channel is relays[0]):
            channel.socket.shutdown(2)
        cut._say(channel, message, **options)

    monkeypatch.setattr(Channel, "send", dying)
    relays = []
    with relaying():
        with sender(address, receivers=3) as first:
            sent(first, 1)
            relays += [peer.channel for peer in first._way._group.peers if peer.size == 2]
            cut.armed = True
            assert sent(first, 2) == heard
        cut.armed = False
        if not heard:  # The relay dies with its sender.
            behind[0].in_state(State.IN_DOUBT)
        else:
            with sender(address, receivers=3) as second:
                assert sent(second, 3) == 3
    if not heard:
        with relaying(), sender(address, receivers=3) as second:
            assert sent(second, 3) == 3
    for worker in (*behind, beside):
        worker.thread.result()
        assert worker.versions == ([1, 2, 3] if heard else [1, 1, 3])


# Left out, when it had voted.


class Leaving:
    """Cuts a receiver's connection as it says a word of version 2. Nobody hears it."""

    def __init__(self, monkeypatch, kind):
        self.channel, say = None, Channel.send

        def cutting(channel, message, **options):
            if isinstance(message, kind) and channel is self.channel:
                channel.socket.shutdown(2)
            say(channel, message, **options)

        monkeypatch.setattr(Channel, "send", cutting)


LEFT_OUT = {
    "the same sender": ([1, 1, 3], False),
    "the next sender": ([1, 2, 3], False),
    "a register": ([1, 1, 3], True),
    "nobody: it had not voted": ([1, 1, 3], True),
}


@pytest.mark.parametrize("by", LEFT_OUT)
def test_who_was_left_out_may_take_the_version_and_the_report_says_so(by, address, tmp_path, monkeypatch):
    """The next sender does not know who was left out, and hears that another has the version."""
    expected, is_known = LEFT_OUT[by]
    leaving = Leaving(monkeypatch, Accept if "nobody" in by else Prepared)
    read, decided = SharedRecord.is_commit, threading.Event()
    # Else it might be the first to write, and nobody would take the version.
    monkeypatch.setattr(SharedRecord, "is_commit", lambda record: decided.wait(TIMEOUT) and read(record))
    stays, leaves = Worker(address, name="stays"), Worker(address, name="leaves")
    with contextlib.ExitStack() as stack:
        register = f"file://{tmp_path}" if by == "a register" else None
        first = stack.enter_context(sender(address, receivers=2, on_lost="drop", decision=register))
        assert sent(first, 1) == 2
        leaving.channel = leaves.source._connection._channel
        report = first.send(Tiny(2), version=2)
        decided.set()
        assert [name[:5] for name in report.committed] == ["stays"]
        ((name, why),) = report.lost.items()
        assert name.startswith("leaves (process")
        assert why.endswith("whether it takes the version is not known here") is not is_known
        if by == "the next sender":
            leaves.in_state(State.IN_DOUBT)
            first.close()
            first = stack.enter_context(sender(address, receivers=2))
        assert sent(first, 3) == 2
    for worker in (stays, leaves):
        worker.thread.result()
    assert (stays.versions, leaves.versions) == ([1, 2, 3], expected)


def count_late(monkeypatch):
    """Between versions relays say only then how many workers they have, when the sender waits for some."""
    say, listen, waits = Channel.send, PeerGroup.listen, threading.Event()

    def listening(group, *how):
        waits.set()
        listen(group, *how)

    def saying(channel, message, **options):
        if isinstance(message, Crew) and channel.session.state is SessionState.IDLE:
            waits.wait(TIMEOUT)
        say(channel, message, **options)

    monkeypatch.setattr(PeerGroup, "listen", listening)
    monkeypatch.setattr(Channel, "send", saying)


def test_who_had_voted_behind_a_relay_that_is_left_out_takes_the_version_later(address, tmp_path, monkeypatch):
    """Of two relays, one behind the other: the sender has counted them as one host, which has it.

    What relays say between versions comes late: the sender has to know without it that one worker less is there.
    """
    between, near, far = free_address(), f"unix:{tmp_path / 'near' / 'socket'}", f"unix:{tmp_path / 'far' / 'socket'}"
    leaving = Leaving(monkeypatch, Prepared)
    first, second = Worker(near, name="first"), Worker(far, name="second")
    with contextlib.ExitStack() as stack:

        def relaying(source, to):
            relay = stack.enter_context(Relay(source, to, timeout=TIMEOUT))
            thread = Thread(relay.run)
            stack.callback(lambda: (relay.close(), thread.result()))
            return relay

        relaying(address, [near, between])
        leaves = relaying(between, far)
        sending = stack.enter_context(sender(address, receivers=2, on_lost="drop"))
        assert sent(sending, 1) == 2
        leaving.channel = leaves._connection._channel
        count_late(monkeypatch)
        report = sending.send(Tiny(2), version=2)
        assert [name[:5] for name in report.committed] == ["first"]
        ((name, why),) = report.lost.items()
        assert name.startswith("second (process")
        assert why.endswith("whether it takes the version is not known here")
        assert sent(sending, 3) == 2
        for worker in (first, second):
            worker.thread.result()
            assert worker.versions == [1, 2, 3]


# By hand.


def resolved(*words):
    """What ``hotweights resolve`` prints, and its exit code."""
    done = CliRunner().invoke(app, ["resolve", *words])
    return done.exit_code, done.output


@pytest.mark.parametrize("heard", [(0,), ()])
def test_resolve_tells_what_follows(heard, address, monkeypatch):
    cut = Cut(monkeypatch, *({0, 1} - {*heard}))
    workers = [Worker(address) for _ in range(2)]
    with sender(address, receivers=2) as first:
        sent(first, 1)
        cut.armed = True
        sent(first, 2)
    code, said = resolved(address, "--wait", "5")
    assert code == 0
    assert f"told to {'commit' if heard else 'abort'}" in said
    cut.armed = False
    with sender(address, receivers=2) as after:
        sent(after, 3)
    for worker in workers:
        worker.thread.result()
        assert worker.versions == ([1, 2, 3] if heard else [1, 1, 3])
        assert not any(isinstance(error.__cause__, hw.TransferInDoubt) for error in worker.errors)


@pytest.mark.parametrize("word", ["commit", "abort"])
def test_where_nothing_follows_somebody_says_it(word, address, monkeypatch):
    """One of two votes, and is gone. The facts are shown; the other waits on until it is told."""

    def vote_and_leave():
        with receiver(address, name="gone", timeout=0.05) as source:
            value_of_all(source)
            with contextlib.suppress(hw.TransferInDoubt):
                value_of_all(source)

    cut = Cut(monkeypatch, 0, 1)
    stays, leaves = Worker(address, name="stays"), Thread(vote_and_leave)
    with sender(address, receivers=2) as first:
        sent(first, 1)
        cut.armed = True
        sent(first, 2)
        cut.armed = False
        leaves.result()
    stays.in_state(State.IN_DOUBT)
    code, said = resolved(address, "--wait", "0.5")
    assert code == 1
    assert "waiting for gone" in said
    assert "--commit or --abort" in said
    assert stays.live.state is State.IN_DOUBT
    code, said = resolved(address, "--wait", "0.5", f"--{word}")
    assert (code, "by hand" in said) == (0, True)
    with sender(address) as after:
        sent(after, 3)
    stays.thread.result()
    assert stays.versions == ([1, 2, 3] if word == "commit" else [1, 1, 3])


def test_resolve_says_when_nobody_is_in_doubt_and_takes_no_sender_s_place(address):
    code, said = resolved(address, "--wait", "0.1")
    assert (code, said.startswith("nobody came within 0.1 s; ")) == (0, True)
    assert resolved(address, "--commit", "--abort")[0] == 2
    with sender(address):
        code, said = resolved(address, "--wait", "1")
        assert (code, f"is held by process {os.getpid()} on" in said) == (1, True)


def test_resolve_names_who_came_and_is_not_in_doubt(address):
    with receiver(address, name="waits") as source:
        waiting = Thread(source.connect, 60.0)
        code, said = resolved(address, "--wait", "3")
        waiting.result()
    name = f"waits (process {os.getpid()} on 127.0.0.1)"
    assert (code, said) == (0, f"nobody who is in doubt came within 3 s; others did: {name}\n")


# Epochs.


def epochs(monkeypatch):
    """The epochs of all offers from here on."""
    say, seen = Channel.send, []

    def noting(channel, message, **options):
        if isinstance(message, Offer):
            seen.append(message.epoch)
        say(channel, message, **options)

    monkeypatch.setattr(Channel, "send", noting)
    return seen


def test_the_next_sender_has_a_larger_epoch_and_the_one_before_never_the_same_again(address, monkeypatch):
    seen = epochs(monkeypatch)
    worker = Worker(address, last=5)
    for versions in ([1, 2], [3], [4, 5]):
        with sender(address) as sending:
            for version in versions:
                sent(sending, version)
    worker.thread.result()
    assert seen == [1, 1, 2, 3, 3]


def test_an_offer_of_an_older_epoch_is_refused(address, monkeypatch):
    worker = Worker(address, last=3)
    with sender(address) as first:
        sent(first, 1)
    with sender(address) as second:
        sent(second, 2)
        second._way._epoch = 0
        peer = type(second._way._group.peers[0])
        monkeypatch.setattr(peer, "epoch", property(lambda peer: 0, lambda peer, value: None))
        with pytest.raises(hw.TransferAborted, match="epoch 1 offered something, and one of epoch 2 came after"):
            second.send(Tiny(3), version=3)
        second._way._epoch = 2
        with contextlib.suppress(hw.ProtocolError):
            worker.thread.join(0)
    assert worker.live.version == 2
    with pytest.raises(hw.ProtocolError, match="epoch 1"):
        worker.thread.result()


# What is said of it.


def test_a_doubt_says_who_is_waited_for():
    members = (Seat(1, 1, "rank0"), Seat(2, 2, "relay on gpu2"))
    doubt = Doubt(7, "step-2", members, ((1, Known.IN_DOUBT), (2, Known.IN_DOUBT)))
    assert doubt.absent == ("relay on gpu2",)
    assert doubt.decision is None
    assert str(doubt) == "version 'step-2': 2 in doubt; waiting for relay on gpu2"
    whole = doubt._replace(told=(*doubt.told, (2, Known.KEPT)))
    assert (whole.absent, whole.decision) == ((), Decision.ABORT)
    assert str(whole) == "version 'step-2': 1 kept, 2 in doubt"


def test_a_past_and_a_verdict_travel():
    account = Account(7, 2, Known.IN_DOUBT, "step-2", (Seat(1, 3, "rank0"),))
    for message in (Past(4, (account,)), Verdict(7, Decision.COMMIT), Verdict(7, None)):
        assert decode(encode(0, message)[HEADER.size :]) == message


def test_the_past_of_a_large_group_is_short():
    """Of a relay with as many workers as there may be, too, in a group of as many relays."""
    peers = [SimpleNamespace(place=number, name="x" * 200, names=("x",)) for number in range(1024)]
    seats = Outbound._electors(SimpleNamespace(_members=peers))
    worker = SimpleNamespace(accounts=(Account(2**62, 1023, Known.IN_DOUBT, "x" * 200, seats),), epoch=9)
    past = past_of([worker] * 1024)
    assert [account.count for account in past.accounts] == [1024]
    assert len(encode(0, past)) < MAX_SMALL
