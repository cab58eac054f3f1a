"""Slots and leases: what ends when, and what may be kept. Pools are tested by their contract, guards in test_guards."""

import pytest
import torch

from hotweights import Lease, OpaqueDtype, Pool, StaleLease, TensorSpec, UnsupportedDtype
from hotweights.testing import ManualEvent

SPEC = TensorSpec("w", torch.float32, (2, 3))


def test_a_slot_is_held_until_its_last_lease_ends():
    with Pool(1, 4096) as pool:
        slot = pool.acquire("w")
        first, second = slot.lease(SPEC, 0), slot.lease(SPEC, 64)
        slot.release()
        first.release()
        assert pool.stats().leased == 1
        second.release()
        second.release()  # a second time does nothing
        assert pool.stats().leased == 0


def test_a_lease_is_the_slots_bytes_at_its_offset():
    with Pool(1, 4096) as pool:
        slot = pool.acquire("w")
        slot.memory[64:88].view(torch.float32).copy_(torch.arange(6))
        with slot.lease(SPEC, 64) as lease:
            assert lease.tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
            assert lease.tensor.data_ptr() == lease.raw.data_ptr() == slot.memory.data_ptr() + 64
        slot.release()


@pytest.mark.parametrize("take", [lambda lease: lease.tensor, lambda lease: lease.raw, lambda lease: lease.own()])
def test_nothing_is_taken_from_a_lease_that_is_over(take):
    lease = Lease(SPEC, tensor=torch.zeros(2, 3))
    lease.release()
    with pytest.raises(StaleLease, match="w"):
        take(lease)


def test_what_is_owned_outlives_the_lease():
    for memory in (torch.zeros(2, 3), torch.zeros(3, 2).t()):
        with Lease(SPEC, tensor=memory) as lease:
            own = lease.own()
        memory.fill_(7)
        assert own.is_contiguous()
        assert own.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_what_is_not_borrowed_is_owned_without_a_copy():
    tensor = torch.zeros(2, 3)
    assert Lease(SPEC, tensor=tensor, borrowed=False).own() is tensor


def test_raw_bytes_are_in_row_major_order():
    tensor = torch.arange(6.0).view(3, 2).t()
    assert torch.equal(Lease(SPEC, tensor=tensor).raw.view(torch.float32), tensor.reshape(-1))


def test_a_dtype_that_torch_lacks_is_carried_as_bytes():
    lease = Lease(TensorSpec("w", OpaqueDtype("F6_E2M3", 6), (4,)), raw=torch.arange(3, dtype=torch.uint8))
    with pytest.raises(UnsupportedDtype, match=r"take \.raw"):
        _ = lease.tensor
    assert lease.raw.tolist() == [0, 1, 2]


def test_it_is_pending_until_its_event_happens():
    event, lease = ManualEvent(), Lease(SPEC, tensor=torch.zeros(2, 3))
    assert not lease.pending()
    lease.release(event)
    assert lease.pending()
    event.happen()
    assert not lease.pending()
