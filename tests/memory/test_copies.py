"""copy_all: the bytes of copy_, whatever the tensors are and however many threads there are."""

import threading

import pytest
import torch
from torch import nn

from hotweights.memory import copies
from hotweights.memory.copies import copy_all, is_one_block
from hotweights.memory.host import copy_bytes
from hotweights.testing import assert_same_bits, bits

KINDS = {
    "small": (lambda: torch.zeros(5), lambda: torch.arange(5.0)),
    "large": (lambda: torch.zeros(3, 1 << 20), lambda: torch.rand(3, 1 << 20)),
    "odd": (
        lambda: torch.zeros((9 << 20) + 3, dtype=torch.uint8),
        lambda: torch.ones((9 << 20) + 3, dtype=torch.uint8),
    ),
    "empty": (lambda: torch.zeros(0), lambda: torch.zeros(0)),
    "scalar": (lambda: torch.zeros(()), lambda: torch.ones(())),
    "transposed": (lambda: torch.zeros(4, 3).t(), lambda: torch.rand(3, 4)),
    "with gaps": (lambda: torch.zeros(6)[::2], lambda: torch.rand(3)),
    "expanded": (lambda: torch.zeros(1).expand(4), lambda: torch.ones(1).expand(4)),
    "another dtype": (lambda: torch.zeros(4), lambda: torch.arange(4)),
    "another shape": (lambda: torch.zeros(2, 4), lambda: torch.rand(4)),
    "conjugated": (lambda: torch.zeros(4, dtype=torch.cfloat), lambda: torch.rand(4, dtype=torch.cfloat).conj()),
    "negated": (lambda: torch.zeros(4), lambda: torch.rand(4, dtype=torch.cfloat).conj().imag),
    "parameter": (lambda: nn.Parameter(torch.zeros(4)), lambda: torch.rand(4)),
    "fp8": (lambda: torch.zeros(4).to(torch.float8_e4m3fn), lambda: torch.rand(4).to(torch.float8_e4m3fn)),
}


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_those_of_copy(kind, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(copies, "_WORTH", 1 << 20)
    make, give = KINDS[kind]
    value, ours, theirs = give(), make(), make()
    copy_all([(ours, value)])
    copy_bytes(theirs, value)
    assert_same_bits({kind: bits(ours)}, {kind: bits(theirs)})


def test_in_inference_mode_and_with_gradients():
    with torch.inference_mode():
        target = torch.zeros(4)
    leaf = nn.Parameter(torch.zeros(4))
    copy_all([(target, torch.ones(4)), (leaf, torch.ones(4, requires_grad=True))])
    assert target.tolist() == leaf.tolist() == [1] * 4
    assert leaf.is_leaf


def test_large_tensors_take_threads_that_have_ended(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    seen, move, barrier, before = set(), copies.move, threading.Barrier(4), threading.active_count()

    def meeting(*piece):
        seen.add(threading.get_ident())
        barrier.wait(30)
        move(*piece)

    monkeypatch.setattr(copies, "move", meeting)
    target, value = torch.zeros(32 << 20), torch.rand(32 << 20)  # 128 MiB: 16 pieces, 4 at a time.
    copy_all([(target, value)])
    assert torch.equal(target, value)
    assert len(seen) == 4
    assert threading.active_count() <= before


def test_where_no_thread_can_be_had_the_caller_copies(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)

    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    target, value = torch.zeros(16 << 20), torch.rand(16 << 20)
    copy_all([(target, value)])
    assert torch.equal(target, value)


def test_no_operation_of_torch_copies_what_is_one_block():
    """Those are what meets its threads."""
    first, second = torch.zeros(1 << 20), torch.ones(1 << 20)
    assert is_one_block(first, second)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        copy_all([(first, second)])
    assert not [event for event in profile.events() if "copy" in event.name]
