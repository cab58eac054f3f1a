"""Carriers: each passes the contracts of carriers and transports; whoever dies or stands still, deadlines are ours."""

import contextlib
import importlib.util
import sys

import pytest
import torch
from ends import Thread, receiver, sender, tensors

import hotweights as hw
from hosts import free_address
from hotweights.testing import CARRIER_CONTRACT, TRANSPORT_CONTRACT, assert_same_bits
from hotweights.transfer import peers as peers_module
from hotweights.transfer.carriers import process_group
from hotweights.transfer.carriers.table import CARRIERS, carrier_of
from hotweights.transfer.endpoint import endpoint_of
from hotweights.transfer.relay import Relay
from hotweights.transfer.shared_memory import WriteSlots

WITH_NIXL = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None, reason="NIXL is not installed: pip install 'hotweights[nixl]'"
)
NAMES = [pytest.param(name, marks=WITH_NIXL) if name == "nixl" else name for name in CARRIERS]


@pytest.fixture
def address():
    return free_address()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", CARRIER_CONTRACT, ids=lambda check: check.__name__)
def test_each_is_a_carrier(check, name):
    check(lambda: carrier_of(name))


class Network:
    """A group over the network."""

    def __init__(self, address, carrier, **options):
        self._address, self._carrier, self._options = address, carrier, options

    def sender(self, receivers):
        return sender(self._address, receivers=receivers, carrier=self._carrier, **self._options)

    def receiver(self):
        return receiver(self._address)


@pytest.mark.parametrize("name", NAMES[1:])  # Sockets have tests of their own.
@pytest.mark.parametrize("check", TRANSPORT_CONTRACT, ids=lambda check: check.__name__)
def test_a_network_with_each_is_a_transport(check, name, address):
    check(lambda: Network(address, name), tensors())


def test_an_unknown_carrier_is_refused_with_those_that_there_are(address):
    with pytest.raises(hw.UsageError, match=r"one of 'sockets', 'pg', 'nixl'; found 'rdma'"):
        hw.Sender(address, carrier="rdma")


def test_a_carrier_is_for_other_hosts(tmp_path):
    with pytest.raises(hw.UsageError, match="leave it out"):
        hw.Sender(f"unix:{tmp_path / 'run' / 'socket'}", carrier="pg")
    with pytest.raises(hw.UsageError, match=r"leave out.*carrier|carrier"):
        hw.Sender(tmp_path, carrier="pg")


@pytest.fixture
def no_nixl(monkeypatch):
    """As where NIXL is not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("nixl") else find(name))
    monkeypatch.delitem(sys.modules, "hotweights.transfer.carriers.nixl", raising=False)


def test_a_sender_without_the_package_says_what_to_type(no_nixl, address):
    with pytest.raises(hw.MissingPackage, match=r"pip install 'hotweights\[nixl\]'"):
        hw.Sender(address, carrier="nixl")


@pytest.mark.parametrize(
    ("named", "wrong", "words"),
    [
        ("nixl", hw.MissingPackage, r"pip install 'hotweights\[nixl\]'"),
        ("avian", hw.TransferError, "the sender's carrier is 'avian', and this hotweights has sockets, pg, nixl"),
    ],
)
def test_a_receiver_that_cannot_have_the_carrier_says_so_at_both_ends(named, wrong, words, no_nixl, address):
    group = peers_module.PeerGroup([endpoint_of(address)], slots := WriteSlots(2, 4096), 3.0)
    group._carrier = named  # As of a sender that has it.
    with contextlib.closing(slots), contextlib.closing(group), receiver(address) as source:
        waiting = Thread(lambda: source.manifest)
        with pytest.raises(hw.TransferTimeout, match=words):
            group.gather(1)
        with pytest.raises(wrong, match=words):
            waiting.result()


@pytest.mark.parametrize("name", NAMES[1:])
def test_beside_a_group_of_the_process_and_through_a_relay(name, address, tmp_path):
    """The relay is told by the sender, and tells the relay that it feeds."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    second, worker = free_address(), f"unix:{tmp_path / 'run' / 'socket'}"
    try:
        with contextlib.ExitStack() as stack:
            for relay in (Relay(address, second), Relay(second, worker)):
                running = Thread(stack.enter_context(relay).run)
                stack.callback(running.result)
                stack.callback(relay.close)
            source = stack.enter_context(receiver(worker))
            sending = stack.enter_context(sender(address, carrier=name))
            taking = Thread(lambda: dict(source.tensors()))
            sending.send(tensors(), version=1)
            assert_same_bits(taking.result(), tensors())
            one = torch.ones(1)
            torch.distributed.all_reduce(one)
            assert one == 1
    finally:
        torch.distributed.destroy_process_group()


def test_what_is_changed_on_its_way_is_noticed(address, monkeypatch):
    """Digests go through the channel, whatever brings the bytes."""
    take = process_group.GroupEnd._receive

    def changing(end, piece):
        take(end, piece)
        piece[0] ^= 1

    monkeypatch.setattr(process_group.GroupEnd, "_receive", changing)
    with sender(address, carrier="pg") as sending, receiver(address) as source:
        waiting = Thread(lambda: dict(source.tensors()))
        with pytest.raises(hw.TransferAborted, match=r"a: \w+ was sent, \w+ was copied"):
            sending.send({"a": torch.arange(5.0)}, version=1)
        with pytest.raises(hw.TransferError, match="is not what the sender held"):
            waiting.result()
