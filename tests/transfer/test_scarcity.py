"""No memory, no descriptors, a clock that jumps: our errors, nothing kept, and the next try works."""

import contextlib
import errno
import itertools
import os
import resource
import time

import pytest
import torch
from ends import Thread, receiver, sender

import hotweights as hw

CONTENT = {"w": torch.arange(5.0)}


@contextlib.contextmanager
def no_descriptors():
    """Inside, this process may open nothing more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("make", [hw.Sender, hw.Receiver])
def test_an_end_without_descriptors_cannot_be_made_and_says_so(make, address):
    with no_descriptors(), pytest.raises(hw.TransferError, match="Too many open files"):
        make(address)
    make(address).close()


def test_a_receiver_without_descriptors_says_so_and_can_later(address):
    with receiver(address) as source, sender(address) as sending:
        with no_descriptors(), pytest.raises(hw.TransferError, match="Too many open files"):
            assert source.manifest
        worker = Thread(lambda: dict(source.tensors()))
        sending.send(CONTENT, version=1)
        assert worker.result().keys() == CONTENT.keys()


def test_a_sender_without_descriptors_refuses_to_send_and_can_later(address):
    with receiver(address) as source, sender(address) as sending:
        worker = Thread(lambda: dict(source.tensors()))
        sending.send(CONTENT, version=1)
        worker.result()
        with no_descriptors(), pytest.raises(hw.TransferError, match="Too many open files"):
            sending.send(CONTENT, version=2)  # no ballot
        worker = Thread(lambda: dict(source.tensors()))
        sending.send(CONTENT, version=3)
        assert (worker.result().keys(), source.version) == (CONTENT.keys(), 3)


@pytest.mark.parametrize("call", ["memfd_create", "posix_fallocate"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM])
def test_no_shared_memory_is_told_when_the_sender_is_made(call, number, address, monkeypatch):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(hw.TransferError, match=f"no shared memory of 8192 bytes.*{os.strerror(number)}"):
            sender(address)
    sender(address).close()


def test_the_clock_on_the_wall_may_jump(address, monkeypatch):
    jumps = itertools.cycle([0.0, 4e9, -4e9])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    with receiver(address) as source, sender(address) as sending:
        worker = Thread(lambda: dict(source.tensors()))
        assert 0 <= sending.send(CONTENT, version=1).seconds < 60
        worker.result()
