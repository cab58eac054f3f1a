"""A worker that died since the last version is told at once; one that said goodbye is waited for, or another for it."""

import os
import signal
import time

import pytest
import torch
from ends import TIMEOUT, Thread, receiver, sender
from processes import context

import hotweights as hw

CONTENT = {"w": torch.ones(3)}


def take(address, ready=None, stay=None):
    """Take a version, say so, and stay until told."""
    with receiver(address, name="rank0", offer_timeout=6 * TIMEOUT) as source:
        dict(source.tensors())
        if ready is not None:
            ready.set()
            stay.wait(6 * TIMEOUT)


@pytest.fixture
def one_died(address):
    """A sender and a receiver, whose connection has ended without a word, as a killed process's does."""
    with sender(address) as sending, receiver(address, name="rank0") as source:
        taking = Thread(lambda: dict(source.tensors()))
        sending.send(CONTENT, version=1)
        taking.result()
        source._connection.drop()
        yield sending


def test_a_killed_worker_is_told_at_once(address):
    ready, stay = context.Event(), context.Event()
    process = context.Process(target=take, args=(address, ready, stay), daemon=True)
    process.start()
    with sender(address, timeout=6 * TIMEOUT) as sending:
        sending.send(CONTENT, version=1)
        assert ready.wait(6 * TIMEOUT)
        os.kill(process.pid, signal.SIGKILL)
        process.join(6 * TIMEOUT)
        began = time.monotonic()
        with pytest.raises(hw.TransferAborted) as caught:
            sending.send(CONTENT, version=2)
        assert time.monotonic() - began < 3 * TIMEOUT
        assert "0 of 1 receivers are there. Send again to wait for another" in str(caught.value)
        assert caught.value.problems == (f"rank0 (process {process.pid}): the other side is gone",)


def test_the_next_send_waits_for_another(one_died, address):
    with pytest.raises(hw.TransferAborted, match="rank0"):
        one_died.send(CONTENT, version=2)
    taking = Thread(take, address)
    assert one_died.send(CONTENT, version=2).committed
    taking.result()


def test_it_is_told_also_if_it_was_not_connected_any_more(one_died):
    assert one_died.connected == ()
    with pytest.raises(hw.TransferAborted, match="rank0"):
        one_died.send(CONTENT, version=2)


def test_who_has_another_in_its_place_is_no_loss(one_died, address):
    taking = Thread(take, address)
    while not one_died.connected:
        pass
    assert one_died.send(CONTENT, version=2).committed
    taking.result()
    taking = Thread(take, address)
    assert one_died.send(CONTENT, version=3).committed  # It is not told later either.
    taking.result()


def test_one_that_said_goodbye_is_waited_for(address):
    with sender(address) as sending:
        for version in range(3):
            taking = Thread(take, address)  # A receiver for each version, which closes it.
            sending.send(CONTENT, version=version)
            taking.result()


def test_with_drop_another_is_waited_for(address):
    with sender(address, on_lost="drop") as sending, receiver(address) as source:
        taking = Thread(lambda: dict(source.tensors()))
        sending.send(CONTENT, version=1)
        taking.result()
        source._connection.drop()
        taking = Thread(take, address)
        sending.send(CONTENT, version=2)
        taking.result()
