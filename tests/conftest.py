"""What every test shares."""

import contextlib
import signal

import pytest
import torch

with contextlib.suppress(ImportError):  # Engines' environments have none.
    from hypothesis import HealthCheck, settings

    # A busy machine is slow, which is no fault.
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")


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
