"""A send beside its caller: what it lends, how it ends, and who is told."""

import contextlib
import gc
import itertools
import os
import signal
import threading
import time
import warnings
import weakref

import pytest
import torch
from ends import TIMEOUT, Thread, receiver, sender
from interrupting import Interrupting

import hotweights as hw
from hotweights.transfer import SendHandle

CONTENT = {"w": torch.arange(5.0)}


def take(address):
    with receiver(address) as source:
        return dict(source.tensors())


def test_it_returns_at_once_and_the_result_is_the_report(address):
    with sender(address) as sending:
        sent = sending.send(CONTENT, version=1, wait=False)  # nobody is connected yet
        assert isinstance(sent, SendHandle)
        assert not sent.done()
        assert repr(sent) == "<SendHandle of version 1: running>"
        with pytest.raises(hw.TransferTimeout, match=r"still being sent after 0.01 s; the send goes on"):
            sent.result(timeout=0.01)
        worker = Thread(take, address)
        report = sent.result(timeout=TIMEOUT)
        assert torch.equal(worker.result()["w"], CONTENT["w"])
        assert (report.version, report.tensors) == (1, 1)
        assert sent.result() is report
        assert sent.done()
        assert repr(sent) == "<SendHandle of version 1: done>"
        worker = Thread(take, address)
        assert sending.send(CONTENT, version=2).version == 2  # The sender can send again.
        worker.result()


def test_a_second_send_while_one_runs_is_refused(address):
    with sender(address) as sending:
        sent = sending.send(CONTENT, version=1, wait=False)
        for wait in (True, False):
            with pytest.raises(hw.UsageError, match="one version at a time"):
                sending.send(CONTENT, version=2, wait=wait)
        worker = Thread(take, address)
        assert sent.result().version == 1
        worker.result()


def test_what_cannot_be_sent_is_told_at_once_and_leaves_the_sender_free(address):
    with sender(address) as sending:
        with pytest.raises(hw.UsageError, match="one name"):
            sending.send([("w", CONTENT["w"])] * 2, version=1, wait=False)
        worker = Thread(take, address)
        assert sending.send(CONTENT, version=1, wait=False).result().version == 1
        worker.result()


def test_without_a_thread_it_is_refused_and_the_sender_stays_free(address, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    with sender(address) as sending:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start)
            with pytest.raises(hw.TransferError, match="wait=True needs no thread"):
                sending.send(CONTENT, version=1, wait=False)
        worker = Thread(take, address)
        assert sending.send(CONTENT, version=1).version == 1
        worker.result()


def test_what_fails_comes_out_of_the_result_each_time(address):
    def pairs():
        yield from CONTENT.items()
        raise OSError("the disk is gone")

    def refused():
        with pytest.raises(hw.TransferError, match="the disk is gone"):
            take(address)

    manifest = hw.Manifest([hw.TensorSpec("w", torch.float32, (5,))])
    with sender(address) as sending:
        worker = Thread(refused)
        sent = sending.send(pairs(), version=1, manifest=manifest, wait=False)
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                sent.result()
        assert repr(sent) == "<SendHandle of version 1: failed>"
        worker.result()


def test_the_end_of_the_sender_ends_it(address):
    with sender(address) as sending:
        sent = sending.send(CONTENT, version=1, wait=False)
    assert sent.done()
    with pytest.raises(hw.Closed):
        sent.result()


def test_the_tensors_are_let_go_when_it_is_done(address):
    content = {"w": torch.arange(5.0)}
    kept = weakref.ref(content["w"])
    with sender(address) as sending:
        sent = sending.send(content, version=1, wait=False)
        del content
        assert kept() is not None
        worker = Thread(take, address)
        sent.result()
        worker.result()
        gc.collect()
        assert kept() is None


def test_a_failure_that_nobody_asked_for_is_a_warning(address):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with sender(address) as sending:
            sent = sending.send(CONTENT, version="step-7", wait=False)
        del sent
        gc.collect()
    assert [str(warning.message) for warning in told if warning.category is ResourceWarning] == [
        "version 'step-7' was not sent, and nobody asked: the sender was closed"
    ]


def test_ctrl_c_ends_the_wait_and_the_send_goes_on(address, monkeypatch):
    with sender(address) as sending:
        sent = sending.send(CONTENT, version=1, wait=False)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Event, "wait", lambda *_: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                sent.result()
        assert not sent.done()
        worker = Thread(take, address)
        assert sent.result().version == 1
        worker.result()


def test_ctrl_c_at_any_line_of_the_beginning_leaves_the_sender_usable(address):
    """The handle may be lost; then the send goes on without it."""

    def work():
        with receiver(address) as source:
            while source.version != "last":
                with contextlib.suppress(hw.TransferError):
                    dict(source.tensors())

    def send_again(version):
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                return sending.send(CONTENT, version=version)
            except hw.UsageError:  # The one that was interrupted runs still.
                assert time.monotonic() < deadline, interrupting.where

    with sender(address) as sending:
        worker = Thread(work)
        for at in itertools.count(step=3):
            sent = None
            with Interrupting(at) as interrupting, contextlib.suppress(KeyboardInterrupt):
                sent = sending.send(CONTENT, version=at, wait=False)
            if sent is not None:
                assert sent.result(TIMEOUT).version == at
            send_again("again" if interrupting.where else "last")
            if interrupting.where is None:
                break
        worker.result()
    assert at > 30


def test_a_source_that_waits_for_its_own_send_is_refused(address):
    box = []
    ready = threading.Event()

    def pairs():
        ready.wait(TIMEOUT)
        box[0].result()
        yield from CONTENT.items()

    def refused():
        with pytest.raises(hw.TransferError, match="wait for itself"):
            take(address)

    manifest = hw.Manifest([hw.TensorSpec("w", torch.float32, (5,))])
    with sender(address) as sending:
        worker = Thread(refused)
        box.append(sending.send(pairs(), version=1, manifest=manifest, wait=False))
        ready.set()
        with pytest.raises(hw.UsageError, match="wait for itself"):
            box[0].result()
        worker.result()
    box.clear()


def test_a_forked_child_is_told_where_the_send_runs(address):
    with sender(address) as sending:
        sent = sending.send(CONTENT, version=1, wait=False)
        child = os.fork()
        if not child:
            try:
                sent.result()
            except hw.UsageError:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        worker = Thread(take, address)
        sent.result()
        worker.result()


def test_the_thread_waits_for_what_is_queued_on_a_device(address, monkeypatch):
    happened, asked = threading.Event(), threading.Event()

    class Queued:
        def query(self):
            asked.set()
            return happened.is_set()

    monkeypatch.setattr("hotweights.transfer.sender.devices.record_events", lambda devices: Queued())
    with sender(address) as sending, receiver(address) as source:
        sent = sending.send(CONTENT, version=1, wait=False)
        assert asked.wait(TIMEOUT)
        assert source.poll() is None
        assert not sent.done()
        happened.set()
        assert dict(source.tensors()).keys() == CONTENT.keys()
        assert sent.result().version == 1


def test_who_trains_on_while_a_version_is_sent_has_not_sent_a_mixture(address):
    """Digests are of what was read, so they fit a version of two steps as well."""
    model = torch.nn.Linear(2, 2)
    with sender(address) as sending:
        sent = sending.send(model, version=1, wait=False)  # Nobody is connected, so nothing is read yet.
        with torch.no_grad():
            model.weight.add_(1)
        worker = Thread(take, address)
        with pytest.raises(hw.UsageError, match=r"weight: written while the version was sent.*send a copy"):
            sent.result(timeout=TIMEOUT)
        with pytest.raises(hw.TransferAborted, match="weight: written while the version was sent"):
            worker.result()
        copied = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # As it says.
        sent = sending.send(copied, version=2, wait=False)
        with torch.no_grad():
            model.weight.add_(1)
        worker = Thread(take, address)
        sent.result(timeout=TIMEOUT)
        assert torch.equal(worker.result()["weight"], copied["weight"])
        worker = Thread(take, address)
        with torch.inference_mode():
            sending.send({"w": torch.ones(2)}, version=3)  # Writes to these are not counted.
        worker.result()
