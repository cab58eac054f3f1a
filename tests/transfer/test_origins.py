"""What a receiver does with ranks that send it bytes themselves, at ends in one process."""

import socket
from contextlib import ExitStack, closing

import msgspec
import pytest
import torch
from ends import Thread, receiver, sender

import hotweights as hw
from hotweights.ranges import Range
from hotweights.transfer import origins as module
from hotweights.transfer.flow import GREETING
from hotweights.transfer.messages import Chunk, Filled, Origin
from hotweights.transfer.origins import Origins
from hotweights.transfer.outbound import Outbound
from hotweights.transfer.peers import Peer
from hotweights.transfer.slot_flow import SlotOutflow

PART = 100_000  # bytes of a chunk


class Ranks:
    """Two ranks, and the receiver to which they send."""

    def __init__(self, stack):
        self._stack = stack
        self.origins = stack.enter_context(closing(Origins()))
        self.doors = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        self.ends, self.memory = {}, torch.zeros(4 * PART, dtype=torch.uint8)

    def named(self, first=1):
        return tuple(
            Origin(number, f"rank {number}", *door.getsockname(), bytes([first + number]) * 32)
            for number, door in enumerate(self.doors, 1)
        )

    def meet(self, named):
        self.origins.meet(named)
        for origin, door in zip(named, self.doors, strict=True):
            connected, _ = door.accept()
            self.origins.greet()
            assert connected.recv(len(GREETING) + 32) == GREETING + origin.token
            self.ends[origin.rank] = self._stack.enter_context(closing(SlotOutflow()))
            connected.setblocking(False)
            self.ends[origin.rank].attach(connected)

    def give(self, rank, fill, value, at):
        memory = torch.full((4 * PART,), value, dtype=torch.uint8)
        self.ends[rank].give(fill, 0, memory, [(at * PART, (at + 1) * PART)])
        self.ends[rank].flush()

    def expect(self, fill, *origins):
        chunks = tuple(Chunk(0, Range(at * PART, PART), at * PART, None) for at in range(len(origins)))
        return self.origins.expect(Filled(0, chunks, fill, origins), self.memory)

    def wait(self, fill):
        """Until all that is to come for this fill is there."""
        while not self.origins.fill(fill):
            for end in self.ends.values():
                end.flush()

    @property
    def values(self):
        return [part.unique().tolist() for part in self.memory.split(PART)]


@pytest.fixture
def ranks():
    with ExitStack() as stack:
        made = Ranks(stack)
        made.meet(made.named())
        yield made


def test_a_slot_is_whole_when_all_have_given(ranks):
    ranks.give(2, 7, 5, 2)  # before the sender has told of it
    assert [chunk.offset for chunk in ranks.expect(7, 1, 0, 2)] == [PART]
    assert ranks.origins.lacking
    assert not ranks.origins.fill(7)
    ranks.give(1, 7, 3, 0)
    ranks.wait(7)
    assert not ranks.origins.lacking
    assert ranks.values == [[3], [0], [5], [0]]


def test_what_comes_before_it_is_told_waits(ranks):
    ranks.expect(7, 1)
    for fill, value in ((7, 3), (8, 4)):
        ranks.give(1, fill, value, 0)
    ranks.wait(7)
    assert ranks.values[0] == [3]
    ranks.expect(8, 1)
    ranks.wait(8)
    assert ranks.values[0] == [4]


def test_nothing_of_an_aborted_version_is_written(ranks):
    ranks.expect(7, 1)
    ranks.expect(8, 1)
    ranks.origins.drop()
    for fill, value in ((7, 3), (8, 4), (9, 5)):
        ranks.give(1, fill, value, 0)
    ranks.expect(9, 0, 2)
    assert not ranks.origins.fill(9)
    ranks.give(2, 9, 6, 1)
    ranks.wait(9)
    assert ranks.values == [[0], [6], [0], [0]]
    ranks.origins.drop()
    ranks.expect(10, 1)
    ranks.give(1, 10, 7, 0)
    ranks.wait(10)
    assert ranks.values[0] == [7]


def test_the_sender_says_first_why_a_rank_is_gone(ranks, monkeypatch):
    ranks.expect(7, 1)
    ranks.ends[1].close()
    while list(ranks.origins.awaited):  # What is ready at once would be so again and again.
        assert not ranks.origins.fill(7)
    monkeypatch.setattr(module, "_GRACE", -1.0)
    with pytest.raises(hw.PeerLost, match="rank 1: the connection for its bytes ended"):
        ranks.origins.fill(7)


def test_connections_last_as_long_as_they_are_offered(ranks):
    ranks.origins.meet(ranks.named())
    ranks.expect(7, 1)
    ranks.give(1, 7, 3, 0)
    ranks.wait(7)
    ranks.meet(ranks.named(first=5))
    ranks.expect(8, 2)
    ranks.give(2, 8, 4, 0)
    ranks.wait(8)
    assert ranks.values[0] == [4]
    ranks.origins.meet(())
    with pytest.raises(hw.ProtocolError, match="bytes of slot 0 were to come from ranks that were not named"):
        ranks.expect(9, 1)


def test_who_was_refused_comes_again_with_the_next_version(ranks):
    """A rank refuses who comes before it has heard of the token."""
    ranks.ends.pop(2).close()
    ranks.doors[0].settimeout(0.01)
    ranks.origins.meet(ranks.named())
    connected, _ = ranks.doors[1].accept()
    ranks.origins.greet()
    assert connected.recv(len(GREETING) + 32) == GREETING + ranks.named()[1].token
    with pytest.raises(TimeoutError):  # The other connection stands.
        ranks.doors[0].accept()
    connected.close()


def test_a_rank_that_is_not_reached_is_logged(caplog):
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = server.getsockname()
    with closing(Origins()) as origins:
        origins.meet((Origin(3, "rank 3 (process 9)", *where, b"t" * 32),))
        while list(origins.awaited):
            origins.greet()
    assert "rank 3 (process 9) cannot be reached at 127.0.0.1, port" in caplog.text
    assert "what it holds comes by way of rank 0" in caplog.text


def test_an_abort_is_heard_while_a_rank_owes_bytes(monkeypatch):
    """The rank may be dead, or stand still. The next version comes over the same connections."""

    def failing():
        yield from content.items()
        raise ValueError("no more")

    def take():
        with receiver(sending.address) as source:
            with pytest.raises(hw.TransferAborted, match="no more"):
                dict(source.tensors())
            return dict(source.tensors())

    content = {name: torch.full((1024,), 3.0) for name in "ab"}
    with socket.create_server(("127.0.0.1", 0)) as silent, sender("tcps://127.0.0.1:0") as sending:
        origin = Origin(1, "rank 1", *silent.getsockname(), b"t" * 32)
        with monkeypatch.context() as patched:
            own, over = Outbound._own, Peer.hand_over
            patched.setattr(Outbound, "_own", lambda *what: msgspec.structs.replace(own(*what), origins=(origin,)))
            patched.setattr(Peer, "hand_over", lambda *what: over(*what, (1,) * len(what[3])))
            worker = Thread(take)
            with pytest.raises(ValueError, match="no more"):
                sending.send(failing(), version=1, manifest=hw.open(content).manifest)
            there = sending.connected
        assert sending.send(content, version=2).committed == there
        assert {name: tensor.unique().tolist() for name, tensor in worker.result().items()} == {"a": [3], "b": [3]}
