"""The door of a rank on another host than rank 0's, where receivers take its bytes."""

import socket
from contextlib import ExitStack, closing

import pytest
import torch

from hotweights.transfer.flow import GREETING
from hotweights.transfer.messages import Hello, encode
from hotweights.transfer.sharded.giving import Giving
from hotweights.transfer.sharded.words import Dismiss, Expect, Give

TOKENS = ((0, b"a" * 32), (3, b"b" * 32))


@pytest.fixture
def rank():
    with ExitStack() as stack:
        giving = stack.enter_context(closing(Giving(("127.0.0.1", 0))))
        giving.do(Expect(1, TOKENS), ())

        def come(said):
            there = stack.enter_context(socket.create_connection(("127.0.0.1", giving.port)))
            there.sendall(said)
            return there

        yield giving, come


def let_in(giving):
    while not (met := giving.met()):
        pass
    return met


def sent_away(giving, there):
    """What it was told before the connection ended."""
    there.settimeout(0.01)
    told = b""
    while True:
        assert giving.met() == ()
        try:
            if not (more := there.recv(4096)):
                return told
            told += more
        except TimeoutError:
            continue
        except ConnectionResetError:
            return told


def test_only_receivers_that_were_told_come_in_and_each_once(rank, caplog):
    giving, come = rank
    assert sent_away(giving, come(GREETING + b"c" * 32)) == b""
    here = come(GREETING + b"b" * 32)
    assert let_in(giving) == (3,)
    assert sent_away(giving, come(GREETING + b"b" * 32)) == b""
    assert "it showed a token that nobody was given, or that was shown before" in caplog.text
    assert b"its receivers connect to rank 0" in sent_away(giving, come(encode(0, Hello(1))))
    memory = torch.arange(9, dtype=torch.uint8)
    giving.do(Give(1, 0, 7, ((3, ((2, 4), (6, 9))),)), (memory,))
    assert giving.flush() == []
    assert here.recv(25, socket.MSG_WAITALL)[20:] == bytes([2, 3, 6, 7, 8])


def test_who_is_told_no_more_goes(rank):
    giving, come = rank
    one = come(GREETING + b"a" * 32)
    assert let_in(giving) == (0,)
    other = come(GREETING + b"b" * 32)
    assert let_in(giving) == (3,)
    giving.do(Dismiss(1, 0), ())
    assert one.recv(1) == b""
    giving.do(Expect(2, ((3, b"d" * 32),)), ())
    assert other.recv(1) == b""


def test_a_receiver_that_is_gone_is_told_of_once(rank):
    giving, come = rank
    there = come(GREETING + b"a" * 32)
    assert let_in(giving) == (0,)
    there.close()
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    lost = []
    while not lost:
        giving.do(Give(1, 0, 7, ((0, ((0, 1 << 20),)),)), (memory,))
        lost = giving.flush()
    assert [place for place, _ in lost] == [0]
    giving.do(Give(1, 0, 8, ((0, ((0, 9),)),)), (memory,))
    assert giving.flush() == []
