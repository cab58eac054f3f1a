"""What every test shares."""

import signal

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """Ctrl-C is heard, also where a shell has started the tests in the background, where it is ignored."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def seeded():
    """Random tensors are the same in every run."""
    torch.manual_seed(0)
