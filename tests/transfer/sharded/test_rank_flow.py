"""The flow of a rank on another host, between two ends of one process."""

import socket
from contextlib import closing

import pytest
import torch

import hotweights as hw
from hotweights.transfer.flow import GREETING, TOKEN
from hotweights.transfer.sharded.rank_flow import RankOutflow, packed, stretch_of
from hotweights.transfer.sharded.words import Patch, Task
from hotweights.transfer.slot_flow import SlotInflow


@pytest.fixture
def ends():
    """What the lead has of the connection, and what the rank has, after the greeting."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    with closing(SlotInflow()) as inflow, closing(RankOutflow(theirs, inflow.token)) as outflow:
        theirs.setblocking(False)
        outflow.flush()
        assert ours.recv(len(GREETING) + TOKEN) == GREETING + inflow.token
        inflow.attach(ours)
        yield inflow, outflow


def slot(value):
    return torch.full((4096,), value, dtype=torch.uint8)


COLUMNS = (Patch(0, (0, 0), (4, 8), 0, (32, 1)), Patch(0, (0, 0), (2, 4), 128, (16, 1)))


def test_parts_go_where_they_belong(ends):
    inflow, outflow = ends
    theirs, landings = packed([Task(128, (0,), COLUMNS, hashed=False)])
    assert [patch.into for patch in theirs[0].patches] == [0, 32]
    here = slot(0)
    inflow.expect(7, 1, here, landings)
    there = torch.arange(4096).to(torch.uint8)
    outflow.give(7, 1, there, list(map(stretch_of, theirs)))
    outflow.flush()
    assert inflow.fill() == [(7, 1)]
    wanted = slot(0)
    wanted[128:].as_strided((4, 8), (32, 1), 128).copy_(torch.arange(128, 160).view(4, 8))
    wanted.as_strided((2, 4), (16, 1), 256).copy_(torch.arange(160, 168).view(2, 4))
    assert torch.equal(here, wanted)


def test_a_round_that_is_over_writes_no_slot_any_more(ends):
    inflow, outflow = ends
    theirs, landings = packed([Task(0, (0,), (Patch(0, (0,), (4096,), 0, (1,)),), hashed=True)])
    here, old, new = slot(0), slot(9), slot(5)
    inflow.expect(1, 0, here, landings)
    outflow.give(1, 0, old, list(map(stretch_of, theirs)))
    half = outflow._views
    raw = b"".join(half)
    half.clear()
    connected = outflow._socket
    connected.send(raw[:1000])
    assert inflow.fill() == []
    inflow.drop()
    here.zero_()
    connected.send(raw[1000:])
    outflow.give(1, 1, old, list(map(stretch_of, theirs)))  # of the same round, which nobody waits for
    inflow.expect(2, 0, here, landings)
    outflow.give(2, 0, new, list(map(stretch_of, theirs)))
    outflow.flush()
    assert inflow.fill() == [(2, 0)]
    assert torch.equal(here, new)


def test_more_than_was_asked_for_is_refused(ends):
    inflow, outflow = ends
    theirs, landings = packed([Task(0, (0,), COLUMNS, hashed=False)])
    inflow.expect(1, 0, slot(0), landings[:1])
    there = slot(1)
    outflow.give(1, 0, there, list(map(stretch_of, theirs)))
    outflow.flush()
    with pytest.raises(hw.ProtocolError, match="it gave 40 bytes of slot 0, where 32 were asked for"):
        inflow.fill()
