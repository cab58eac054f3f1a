"""Memory that a device still reads: it goes back to the sender, or is used again, only after that."""

import types

import pytest
import torch
from ends import TIMEOUT

import hotweights as hw
from hotweights.memory.devices import POLL
from hotweights.transfer.messages import Release
from hotweights.transfer.pending_leases import PendingLeases, PrivateMemory
from hotweights.transfer.roll import Roll, roll_nbytes
from hotweights.transfer.states import SessionState

SPEC = hw.TensorSpec("w", torch.float32, (2,))


class Event:
    """Has happened when a test says so, or when it was asked so often."""

    def __init__(self, asked=None):
        self.happened, self._left = False, asked

    def query(self):
        if self._left is not None:
            self._left -= 1
            self.happened = self._left <= 0
        return self.happened


class Connection:
    """To a sender with four slots; it notes what is sent."""

    def __init__(self):
        roll = Roll(memoryview(bytearray(roll_nbytes(4))), 4)
        for slot in range(4):
            roll.note_fill(slot, 10 * slot)
        self.slots = types.SimpleNamespace(memories=range(4), roll=roll, bears=roll.bears)
        self.session = types.SimpleNamespace(state=SessionState.STREAMING)
        self.connected, self.stopped, self.sent = True, False, []

    def send(self, message):
        self.sent.append(message)

    def check_open(self):
        if self.stopped:
            raise hw.Closed("closed")


@pytest.fixture
def connection():
    return Connection()


@pytest.fixture
def pending(connection):
    return PendingLeases(connection, PrivateMemory(), TIMEOUT)


def ended(after, guard="off", raw=None):
    raw = torch.zeros(SPEC.nbytes, dtype=torch.uint8) if raw is None else raw
    lease = hw.Lease(SPEC, raw=raw, guard=guard)
    lease.release(after)
    return lease


def test_a_slot_goes_back_when_every_lease_in_it_was_read(connection, pending):
    first, second = Event(), Event()
    pending.return_slot(0, 00, [ended(None), ended(first)])
    pending.return_slot(1, 10, [ended(second)])
    assert pending.give_back() == POLL
    assert connection.sent == []
    second.happened = True
    assert pending.give_back() == POLL
    first.happened = True
    assert pending.give_back() == 0.0
    assert connection.sent == [Release((1,)), Release((0,))]


def test_slots_go_back_by_the_half_of_them_at_once(connection, pending):
    pending.return_slot(2, 20, [ended(None)])
    assert connection.sent == []
    pending.return_slot(3, 30, [])
    assert connection.sent == [Release((2, 3))]


@pytest.mark.parametrize("state", [SessionState.STREAMING, SessionState.ENDED])
def test_a_slot_that_was_filled_again_while_it_was_read_ends_the_stream(state, connection, pending):
    connection.session.state = state
    event = Event()
    pending.return_slot(1, 10, [ended(event)])
    assert pending.give_back() == POLL  # Nothing is known before the device has read.
    connection.slots.roll.note_fill(1, 11)
    event.happened = True
    with pytest.raises(hw.TransferError, match=r"filled a slot again that was still read; Sender\(\.\.\., timeout="):
        pending.give_back()
    assert connection.sent == []


@pytest.mark.parametrize("change", [{"connected": False}, {"session": types.SimpleNamespace(state=SessionState.ENDED)}])
def test_nobody_is_told_who_does_not_wait_for_it(change, connection, pending):
    vars(connection).update(change)
    pending.return_slot(0, 00, [])
    assert pending.give_back() == 0.0
    assert connection.sent == []


def test_private_memory_is_used_again_when_it_was_read(pending):
    memory = pending.private(SPEC.nbytes)
    event = Event(asked=3)
    pending.lend_private(ended(event, raw=memory))
    assert pending.private(SPEC.nbytes).data_ptr() == memory.data_ptr()
    assert event.happened


def test_private_memory_that_is_read_for_ever_is_not_used_again(connection):
    pending = PendingLeases(connection, PrivateMemory(), 0.02)
    pending.lend_private(ended(Event()))
    with pytest.raises(hw.TransferTimeout, match=r"a device did not finish its copy within 0\.02 s"):
        pending.private(SPEC.nbytes)


def test_a_guard_poisons_private_memory_when_it_was_read_and_not_before(pending):
    memory = pending.private(SPEC.nbytes).fill_(1)
    event = Event()
    pending.lend_private(ended(event, guard="poison", raw=memory))
    pending.free_private()
    assert memory.tolist() == [1] * SPEC.nbytes
    event.happened = True
    pending.free_private()
    assert memory.tolist() == [0xFF] * SPEC.nbytes


def test_settling_waits_for_both_kinds_of_memory(connection, pending):
    events = Event(asked=3), Event(asked=9)
    pending.lend_private(ended(events[0]))
    pending.return_slot(0, 00, [ended(events[1])])
    pending.settle()
    assert all(event.happened for event in events)
    assert connection.sent == [Release((0,))]


def test_settling_ends_when_the_receiver_is_closed(connection, pending):
    connection.stopped = True
    pending.return_slot(0, 00, [ended(Event())])
    with pytest.raises(hw.Closed):
        pending.settle()


def test_what_was_lent_in_a_version_that_is_over_is_not_given_back(connection, pending):
    pending.return_slot(0, 00, [ended(Event())])
    pending.lend_private(ended(Event()))
    pending.forget()
    pending.settle()
    assert connection.sent == []
