"""Streams of leases: one lease at a time, every end an end; and work that is done ahead of whoever takes it."""

import contextlib
import itertools
import threading

import pytest
import torch
from interrupting import Interrupting

from hotweights import Closed, Lease, StaleLease, TensorSpec
from hotweights.sources.streams import LeaseStream, ahead


def lease(name):
    return Lease(TensorSpec(name, torch.float32, (1,)), tensor=torch.zeros(1))


def stream(*names):
    return LeaseStream(lease(name) for name in names)


def test_a_lease_ends_when_the_next_begins_and_when_the_stream_closes():
    with stream("a", "b") as leases:
        first = next(leases)
        second = next(leases)
        with pytest.raises(StaleLease, match="a"):
            _ = first.tensor
        assert second.tensor.numel() == 1
    with pytest.raises(StaleLease, match="b"):
        _ = second.tensor


def test_the_end_stays_the_end_and_a_closed_stream_says_so():
    with stream("a") as leases:
        assert len(list(leases)) == 1
        assert next(leases, None) is None
    with pytest.raises(StopIteration):
        next(leases)
    with stream("a", "b") as leases:
        next(leases)
    with pytest.raises(Closed):
        next(leases)


def test_an_error_is_not_taken_for_the_end():
    def fails():
        yield lease("a")
        raise OSError("gone")

    with LeaseStream(fails()) as leases:
        next(leases)
        with pytest.raises(OSError, match="gone"):
            next(leases)
        with pytest.raises(Closed):
            next(leases)


def test_a_forgotten_stream_is_told():
    leases = stream("a")
    next(leases)
    with pytest.warns(ResourceWarning, match="not closed"):
        del leases


def test_ctrl_c_at_any_line_before_a_stream_begins_leaves_nothing_to_tell(recwarn):
    for at in itertools.count():
        with contextlib.suppress(KeyboardInterrupt), Interrupting(at), stream("a"):
            break
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_results_come_in_order(depth):
    stopped = []
    work = [lambda number=number: number for number in range(10)]
    assert list(ahead(work, depth=depth, stop=lambda: stopped.append(True))) == list(range(10))
    assert len(stopped) == (depth > 0)


def test_it_is_only_as_far_ahead_as_it_may():
    given = []

    def work():
        for number in range(10):
            given.append(number)
            yield lambda number=number: number

    results = ahead(work(), depth=2, stop=lambda: None)
    assert next(results) == 0
    assert given == [0, 1, 2]
    results.close()


def test_what_nobody_took_is_dropped():
    dropped, last = [], threading.Event()
    work = [lambda: 0, lambda: 1, lambda: last.set() or 2]
    results = ahead(work, depth=2, stop=lambda: None, drop=dropped.append)
    assert next(results) == 0
    assert last.wait(60)
    results.close()
    assert dropped == [1, 2]


def test_an_error_comes_where_its_result_would():
    def fails():
        raise OSError("second")

    results = ahead([lambda: 1, fails, lambda: 3], depth=3, stop=lambda: None)
    assert next(results) == 1
    with pytest.raises(OSError, match="second"):
        next(results)
