"""Waiting for what a device does: it ends when that has happened, at the deadline, or when somebody says stop."""

import itertools

import pytest

from hotweights.memory import devices


def after(count):
    """True from the ``count``-th time on that it is asked."""
    asked = itertools.count()
    return lambda: next(asked) >= count


@pytest.mark.parametrize("timeout", [60.0, None, float("inf")])
def test_a_wait_ends_when_it_happened(timeout):
    assert devices.wait(after(0), timeout)
    assert devices.wait(after(3), timeout)


def test_what_has_happened_is_seen_even_when_there_is_no_time_and_somebody_says_stop():
    assert devices.wait(lambda: True, 0.0, lambda: True)


def test_a_wait_ends_at_its_deadline():
    assert not devices.wait(lambda: False, 0.0)
    assert not devices.wait(lambda: False, 0.005)


def test_a_wait_ends_when_somebody_says_stop():
    assert not devices.wait(lambda: False, None, after(3))


def test_what_stop_raises_ends_the_wait():
    def stop():
        raise KeyError("closed")

    with pytest.raises(KeyError, match="closed"):
        devices.wait(lambda: False, None, stop)
