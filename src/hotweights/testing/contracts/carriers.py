"""The contract of a carrier, which brings bytes of slots from one host to another, as checks."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import torch

from ...errors import PeerLost
from ...ranges import Range
from ...transfer.flow import GREETING, TOKEN, Carrier, Inflow, Outflow
from ...transfer.messages import Chunk
from ..checks import raised

_PATIENCE = 20.0  # seconds that one end may take; longer waits count as endless
_PROMPT = 5.0  # seconds that a call may take which never blocks, on a busy machine
_SLOT = 1 << 20
_LARGE = 16 << 20  # bytes that no kernel keeps between two ends

MakeCarrier = Callable[[], Carrier]


def what_is_put_arrives_in_its_place(make: MakeCarrier) -> None:
    """Only the chunks of a slot, each where it lay; slots one after the other, as they were put."""
    with _flow(make()) as (outflow, inflow):
        for number in range(5):
            memory, room = _filled(number + 1), torch.zeros(_SLOT, dtype=torch.uint8)
            chunks = (_chunk(700_000, 300_001), _chunk(0, 5), _chunk(64, 200_000), _chunk(_SLOT - 1, 1))
            outflow.put(memory, chunks)
            inflow.expect(room, chunks)
            _until(lambda: not inflow.take(), outflow, inflow)
            for chunk in chunks:
                here = slice(chunk.offset, chunk.offset + chunk.range.size)
                assert torch.equal(room[here], memory[here])
            assert not room[250_000:650_000].any(), "what is no part of a chunk was written"
        _until(lambda: outflow.waiting is None, outflow)  # It may hear a little later that everything has arrived.
        assert outflow.nbytes >= 5 * 500_007, "what was sent was not counted"


def nothing_is_as_good_as_something(make: MakeCarrier) -> None:
    """Chunks of empty tensors have no bytes, and nothing is waited for; what follows them arrives."""
    with _flow(make()) as (outflow, inflow):
        for chunks in ((_chunk(0, 0),), (), (_chunk(0, 9), _chunk(64, 0))):
            memory, room = _filled(1), torch.zeros(_SLOT, dtype=torch.uint8)
            outflow.put(memory, chunks)
            inflow.expect(room, chunks)
            _until(lambda: not inflow.take(), outflow, inflow)
        assert torch.equal(room[:9], memory[:9])


def either_end_may_be_ahead(make: MakeCarrier) -> None:
    """Nothing blocks when the other end does nothing yet, however much is to be moved. It arrives when it does."""
    memories = [_filled(number, _LARGE) for number in (1, 2)]
    rooms = [torch.zeros(_LARGE, dtype=torch.uint8) for _ in memories]
    whole = (_chunk(0, _LARGE),)
    with _flow(make()) as (outflow, inflow):
        _promptly(lambda: outflow.put(memories[0], whole))
        for _ in range(10):
            _promptly(outflow.flush)
        assert outflow.waiting is not None, "16 MiB are not on their way, and nobody has asked for them"
        assert not rooms[0].any()
        inflow.expect(rooms[0], whole)
        _until(lambda: not inflow.take(), outflow, inflow)
        inflow.expect(rooms[1], whole)
        for _ in range(10):
            assert _promptly(inflow.take), "nothing was put, and it is there"
        outflow.put(memories[1], whole)
        _until(lambda: not inflow.take(), outflow, inflow)
    for memory, room in zip(memories, rooms, strict=True):
        assert torch.equal(memory, room)


def several_slots_may_be_expected(make: MakeCarrier) -> None:
    """Each is there before all that were expected after it, and is counted then."""
    memories = [_filled(number) for number in range(4)]
    rooms = [torch.zeros(_SLOT, dtype=torch.uint8) for _ in memories]
    whole, gaps = (_chunk(0, _SLOT),), (_chunk(0, 9), _chunk(700_000, 64), _chunk(900_000, 1))
    with _flow(make()) as (outflow, inflow):
        for room, chunks in zip(rooms, (whole, gaps, (), whole), strict=True):
            inflow.expect(room, chunks)
        assert inflow.take() == 4
        for memory, chunks in zip(memories[:2], (whole, gaps), strict=True):
            outflow.put(memory, chunks)
        _until(lambda: inflow.take() == 1, outflow, inflow)
        assert torch.equal(rooms[0], memories[0])
        assert torch.equal(rooms[1][:9], memories[1][:9])
        assert rooms[1][900_000] == memories[1][900_000]
        assert not rooms[3].any()
        outflow.put(memories[3], whole)
        _until(lambda: not inflow.take(), outflow, inflow)
        assert torch.equal(rooms[3], memories[3])


def a_receiver_hears_that_its_sender_is_gone(make: MakeCarrier) -> None:
    """In the midst of something: ``fill`` raises, soon, and for ever."""
    with _flow(make()) as (outflow, inflow):
        inflow.expect(torch.zeros(_SLOT, dtype=torch.uint8), (_chunk(0, _SLOT),))
        inflow.take()
        outflow.close()
        raised(PeerLost, lambda: _until(lambda: not inflow.take(), outflow, inflow))


def a_sender_hears_that_its_receiver_is_gone(make: MakeCarrier) -> None:
    """In the midst of something: ``flush`` raises, soon."""
    with _flow(make()) as (outflow, inflow):
        outflow.put(_filled(1, _LARGE), (_chunk(0, _LARGE),))
        outflow.flush()
        inflow.close()
        raised(PeerLost, lambda: _until(lambda: outflow.waiting is None, outflow))


def closing_ends_what_is_under_way(make: MakeCarrier) -> None:
    """At both ends, whatever the other one does: promptly, twice; no thread stays, and nothing is written any more."""
    before = threading.active_count()
    for first in (0, 1):
        room = torch.zeros(_LARGE, dtype=torch.uint8)
        with _flow(make()) as (outflow, inflow):
            outflow.put(_filled(1, _LARGE), (_chunk(0, _LARGE),))
            outflow.flush()
            inflow.expect(room, (_chunk(0, _LARGE),) * (1 + first))
            inflow.take()
            for end in (outflow, inflow)[:: 1 - 2 * first] * 2:
                _promptly(end.close)
        until = time.monotonic() + _PATIENCE
        while threading.active_count() > before:
            assert time.monotonic() < until, "a thread stays"
            time.sleep(0.001)
        room.zero_()
        assert not room.any()


def close_ends_a_wait_for_an_end_that_says_nothing(make: MakeCarrier) -> None:
    """The other end is there and does nothing, as one that was stopped, or whose link is cut."""
    before = threading.active_count()
    with _flow(make()) as (_, inflow):
        room = torch.zeros(_SLOT, dtype=torch.uint8)
        inflow.expect(room, (_chunk(0, _SLOT),))
        assert inflow.take() == 1
        threads = threading.active_count() - before
        _promptly(inflow.close)
        until = time.monotonic() + _PATIENCE
        while threads and threading.active_count() - before >= threads:
            assert time.monotonic() < until, "its thread waits still"
            time.sleep(0.001)


def another_flow_is_as_good_as_the_first(make: MakeCarrier) -> None:
    """After a loss, and beside others: what happens to one flow is nothing to another."""
    carrier = make()
    with _flow(carrier) as (outflow, inflow), _flow(carrier) as (other, inflow_of_other):
        inflow.expect(torch.zeros(_SLOT, dtype=torch.uint8), (_chunk(0, _SLOT),))
        inflow.take()
        outflow.close()
        raised(PeerLost, lambda: _until(lambda: not inflow.take(), outflow, inflow))
        inflow.close()
        _carries(other, inflow_of_other)
        with _flow(carrier) as (outflow, inflow):
            _carries(outflow, inflow)


def tokens_differ(make: MakeCarrier) -> None:
    """Who shows one takes part by it: nobody can guess another's."""
    carrier = make()
    tokens = {carrier.outflow().token for _ in range(20)}
    assert len(tokens) == 20
    assert {len(token) for token in tokens} == {TOKEN}


def _filled(number: int, nbytes: int = _SLOT) -> torch.Tensor:
    return torch.randint(1, 255, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


def _chunk(offset: int, nbytes: int) -> Chunk:
    return Chunk(0, Range(0, nbytes), offset, None)


def _carries(outflow: Outflow, inflow: Inflow) -> None:
    memory, room = _filled(7), torch.zeros(_SLOT, dtype=torch.uint8)
    outflow.put(memory, (_chunk(0, _SLOT),))
    inflow.expect(room, (_chunk(0, _SLOT),))
    _until(lambda: not inflow.take(), outflow, inflow)
    assert torch.equal(memory, room)


def _promptly(do: Callable[[], object]) -> object:
    began = time.monotonic()
    result = do()
    took = time.monotonic() - began
    assert took < _PROMPT, f"a call that never blocks took {took:.1f} s"
    return result


def _until(done: Callable[[], object], outflow: Outflow, inflow: Inflow | None = None) -> None:
    """Do what the ends' owners do, until it is done: wait for what they say, and have them go on."""
    until = time.monotonic() + _PATIENCE
    while not done():
        assert time.monotonic() < until, "it never arrives"
        poll = select.poll()
        waiting = outflow.waiting
        for awaited in (waiting, None if inflow is None else inflow.awaited):
            if awaited is not None:
                poll.register(awaited[0], select.POLLIN | (select.POLLOUT if awaited[1] else 0))
        poll.poll(1000)
        outflow.flush()


@contextmanager
def _flow(carrier: Carrier) -> Iterator[tuple[Outflow, Inflow]]:
    """Both ends of a new flow, on this host, with its token shown."""
    outflow = carrier.outflow()
    with socket.create_server(("127.0.0.1", 0)) as server, closing(outflow):
        connecting = socket.create_connection(server.getsockname())
        connecting.setblocking(False)
        with closing(carrier.inflow(connecting, outflow.token)) as inflow:
            accepted, _ = server.accept()
            assert not outflow.attached
            assert inflow.greets
            while not inflow.greet():
                select.select([], [inflow.awaited[0]], [], _PATIENCE)
            shown = accepted.recv(len(GREETING) + TOKEN, socket.MSG_WAITALL)
            assert shown == GREETING + outflow.token
            accepted.setblocking(False)
            outflow.attach(accepted)
            assert outflow.attached
            assert not inflow.greets
            yield outflow, inflow


CARRIER_CONTRACT: tuple[Callable[[MakeCarrier], None], ...] = (
    what_is_put_arrives_in_its_place,
    nothing_is_as_good_as_something,
    either_end_may_be_ahead,
    several_slots_may_be_expected,
    a_receiver_hears_that_its_sender_is_gone,
    a_sender_hears_that_its_receiver_is_gone,
    closing_ends_what_is_under_way,
    close_ends_a_wait_for_an_end_that_says_nothing,
    another_flow_is_as_good_as_the_first,
    tokens_differ,
)
"""What every carrier must do. Each check takes what gives the carrier."""
