"""Ctrl-C at every line from the wait for the decision on: a member is never alone with its version."""

import contextlib
import itertools
import signal
import threading
import time

import pytest
import torch
from ends import TIMEOUT, Thread, going_on, receiver, sender
from interrupting import Interrupting, at_every, at_every_place
from processes import Tiny, value_of

import hotweights as hw
from hotweights import signals
from hotweights.signals import first_waits, held, watched
from hotweights.transfer.ballot import Ballot
from hotweights.transfer.decision import Decision
from hotweights.transfer.outbound import Outbound
from hotweights.transfer.receiver import Receiver


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.long)])  # at every so many-th line
@pytest.mark.parametrize("atomic", ["staged", "journal"])
def test_ctrl_c_at_any_line_leaves_no_member_alone(atomic, step, address, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    decided, decide, decision = threading.Event(), Ballot.decide, Receiver.decision
    running = {"interrupting": Interrupting(-1)}

    def noting(ballot, vote):
        written = decide(ballot, vote)
        if written is Decision.COMMIT:
            decided.set()
        return written

    def arming(source):
        if threading.current_thread() is threading.main_thread():
            running["interrupting"].armed = True
        return decision(source)

    monkeypatch.setattr(Ballot, "decide", noting)
    monkeypatch.setattr(Receiver, "decision", arming)
    live, other = (hw.LiveModel(Tiny(), atomic=atomic) for _ in range(2))
    outcomes = set()

    def follow(source):
        with contextlib.suppress(hw.UpdateAborted):
            other.update(source)

    def send(sending, version):
        try:
            return len(sending.send(Tiny(version % 100), version=version).committed)
        except hw.TransferAborted:
            return 0

    with receiver(address) as mine, receiver(address) as theirs, sender(address, receivers=2) as sending:
        first = [Thread(send, sending, 0), Thread(other.load, theirs)]
        live.load(mine)
        for thread in first:
            thread.result()
        for at in itertools.count(step=step):
            decided.clear()
            threads = [Thread(send, sending, at + 1), Thread(follow, theirs)]
            with Interrupting(at, armed=False) as interrupting:
                running["interrupting"] = interrupting
                with contextlib.suppress(KeyboardInterrupt):
                    live.update(mine)
                    assert interrupting.where is None, f"{interrupting.where}: it was swallowed"
            committed = threads[0].result()
            threads[1].result()
            took = live.version == at + 1
            assert took == (other.version == at + 1) == decided.is_set(), interrupting.where
            assert committed == (2 if took else 0), interrupting.where
            assert value_of(live.model) == live.version % 100
            assert signal.getsignal(signal.SIGINT) is handler, interrupting.where
            outcomes.add(took)
            if interrupting.where is None:
                break
    assert outcomes == {False, True}
    assert at > 100


def test_the_first_of_each_kind_waits_and_the_second_does_not():
    woken = []

    def work():
        with first_waits(lambda: woken.append("woken")) as interruption:
            signal.raise_signal(signal.SIGINT)
            assert interruption.came
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            woken.append("went on")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert woken == ["woken", "went on"]


def test_in_other_threads_nothing_is_touched():
    handler = signal.getsignal(signal.SIGINT)

    def hold():
        with first_waits(lambda: None):
            return signal.getsignal(signal.SIGINT) is handler

    assert Thread(hold).result()


def test_a_handler_that_somebody_sets_inside_stays():
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, lambda *_: None)
        with first_waits(lambda: None):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("look", range(1, 12))
def test_a_trainer_that_is_interrupted_at_any_wait_sends_again(look, address, monkeypatch):
    """Whoever waited for it then is parted with, or has the version; the next one reaches all."""
    looks, look_as_ever = itertools.count(), Outbound._look

    def interrupted(self, *arguments):
        if next(looks) == look:
            raise KeyboardInterrupt
        return look_as_ever(self, *arguments)

    def take():
        with receiver(address) as source:
            while source.version != "last":
                with contextlib.suppress(hw.TransferError):
                    tensors = dict(source.tensors())
            return tensors

    content = {f"w{number}": torch.full((1000,), float(number)) for number in range(4)}
    taking = Thread(take)
    with sender(address) as sending:
        with monkeypatch.context() as patch:
            patch.setattr(Outbound, "_look", interrupted)
            with contextlib.suppress(KeyboardInterrupt):
                sending.send(content, version="first")
        sending.send(content, version="last")
    assert taking.result()["w3"].tolist() == [3.0] * 1000


def take_all(source):
    """Take versions, those that come whole, until the last."""
    while source.version != "last":
        with contextlib.suppress(hw.TransferError):
            dict(source.tensors())


def test_ctrl_c_at_any_line_of_a_trainer_loses_no_frame(address):
    """Nobody waits until a deadline for what was never said: the next version reaches all at once."""
    sending = sender(address)
    with receiver(address) as source, sending:
        taking = Thread(take_all, source)
        for at in itertools.count(step=29):
            with Interrupting(at) as interrupting, contextlib.suppress(KeyboardInterrupt, hw.TransferError):
                sending.send({"w": torch.ones(3)}, version=at)
            began = time.monotonic()
            sending.send({"w": torch.ones(3)}, version="again" if interrupting.where else "last")
            assert time.monotonic() - began < TIMEOUT / 2, interrupting.where
            if interrupting.where is None:
                break
        taking.result()
    assert at > 300


def test_ctrl_c_while_a_ballot_is_made_leaves_no_descriptor():
    """``nothing_left`` looks for it."""

    @watched
    def made():
        Ballot.new().close()

    for interrupting in at_every(1):
        with interrupting, contextlib.suppress(KeyboardInterrupt):
            made()


def test_ctrl_c_at_each_line_that_hands_a_version_on_leaves_no_descriptor(address):
    """From a sender to those that it is for. ``nothing_left`` looks for the ballot's."""
    with receiver(address) as source, sender(address) as sending:
        taking = Thread(take_all, source)

        def send(version="before"):
            sending.send({"w": torch.ones(3)}, version=version)

        at = [
            each for each in at_every_place(send) if each.place[0].co_filename.endswith(("/sender.py", "/audience.py"))
        ]
        for interrupting in at:
            with interrupting, contextlib.suppress(KeyboardInterrupt, hw.TransferError):
                send()
        send("last")
        taking.result()
    assert len(at) > 50


def test_ctrl_c_at_any_line_of_plain_code_loses_no_frame(address):
    handler = signal.getsignal(signal.SIGINT)
    with going_on(address, {"w": torch.ones(3), "v": torch.ones(2000)}), receiver(address) as source:
        dict(source.tensors())
        for at in itertools.count(step=29):
            with Interrupting(at) as interrupting, contextlib.suppress(KeyboardInterrupt, hw.TransferError):
                dict(source.tensors())
            began = time.monotonic()
            for _ in range(3):
                with contextlib.suppress(hw.TransferError):
                    assert dict(source.tensors()).keys() == {"w", "v"}
                    break
            else:
                raise AssertionError(f"{interrupting.where}: nothing came in three versions")
            assert time.monotonic() - began < TIMEOUT / 2, interrupting.where
            assert signal.getsignal(signal.SIGINT) is handler
            if interrupting.where is None:
                break
    assert at > 300


def test_the_end_of_a_watch_elsewhere_does_not_disturb_one_that_ends_here(monkeypatch):
    """The handlers that were there before are put back, whatever line the signal came at."""
    handler = signal.getsignal(signal.SIGINT)

    @held
    def in_main_thread():
        if threading.current_thread() is not threading.main_thread():
            return False
        if ending and not signals._watch.watchers:
            ending.clear()
            Thread(signals.unwatch, None).result()
            signal.raise_signal(signal.SIGINT)
        return True

    ending = set()
    watcher = signals.watch()
    monkeypatch.setattr(signals, "_in_main_thread", in_main_thread)

    def end():
        ending.add("now")
        signals.unwatch(watcher)
        signal.raise_signal(signal.SIGINT)  # If it did not come within.

    with pytest.raises(KeyboardInterrupt):
        end()
    assert signal.getsignal(signal.SIGINT) is handler
