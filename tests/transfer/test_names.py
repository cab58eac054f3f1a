"""A receiver has a name, and looks whether a version is there without waiting for it."""

import os

import pytest
import torch
from ends import Thread, receiver, sender

import hotweights as hw

CONTENT = {"w": torch.arange(5.0)}


def test_a_name_stands_in_reports_and_errors(address):
    name = f"rank0 (process {os.getpid()})"

    def take():
        with receiver(address, name="rank0") as source:
            dict(source.tensors())
            assert source.manifest
            source.refuse(ValueError("no room"))

    with sender(address) as sending:
        worker = Thread(take)
        assert sending.send(CONTENT, version=1).committed == (name,)
        with pytest.raises(hw.TransferAborted) as told:
            sending.send(CONTENT, version=2)
        worker.result()
    assert told.value.problems == [f"{name}: ValueError: no room"] or name in str(told.value)


@pytest.mark.parametrize("name", ["x" * 101, "a\nb"])
def test_names_that_no_error_can_show_are_refused(name, address):
    with pytest.raises(hw.UsageError, match="printable characters"):
        receiver(address, name=name)


def test_poll_never_waits_and_keeps_the_offer(address):
    with receiver(address) as source:
        assert source.poll() is None  # nobody listens
        with sender(address) as sending:
            assert source.poll() is None  # nothing is sent
            trainer = Thread(lambda: sending.send(CONTENT, version="step-1"))
            while source.poll() is None:
                assert trainer.is_alive()
            assert source.poll() == source.version == "step-1"
            assert dict(source.tensors()).keys() == CONTENT.keys()
            assert trainer.result().version == "step-1"
            assert source.poll() is None
        assert source.poll() is None  # the sender is gone
        with sender(address) as sending:
            worker = Thread(lambda: dict(source.tensors()))
            sending.send(CONTENT, version=2)
            worker.result()
    with pytest.raises(hw.Closed):
        source.poll()


def test_connecting_waits_no_longer_than_it_was_told(address):
    with receiver(address, reconnect=False) as source:
        assert not source.connect(0.01)  # nobody listens
        with sender(address):
            assert not source.connect(0.01)  # nobody asks the sender who is there
        with pytest.raises(hw.UsageError, match="seconds"):
            source.connect(-1)
    with pytest.raises(hw.Closed):
        source.connect(0.01)


def test_a_sender_tells_who_is_connected_and_forgets_the_dead(address):
    with sender(address) as sending:
        assert sending.connected == ()
        with receiver(address, name="rank0") as first, receiver(address, name="rank1") as second:
            for source in (first, second):
                assert source.poll() is None  # It has said hello.
            pid = os.getpid()  # of both, so that the second is numbered
            assert sending.connected == (f"rank0 (process {pid})", f"rank1 (process {pid} #2)")
        assert sending.connected == ()
    with pytest.raises(hw.Closed):
        assert sending.connected
