"""Carriers: each passes the contracts of carriers and transports; whoever dies or stands still, deadlines are ours."""

import contextlib
import importlib.util
import os
import signal
import sys
import threading
import time

import pytest
import torch
from ends import TIMEOUT, Thread, receiver, sender, tensors
from namespaces import enter
from processes import Child, value_of

import hotweights as hw
from hosts import free_address
from hotweights.testing import CARRIER_CONTRACT, TRANSPORT_CONTRACT, assert_same_bits
from hotweights.transfer import peers as peers_module
from hotweights.transfer.carriers import process_group
from hotweights.transfer.carriers.table import CARRIERS, carrier_of
from hotweights.transfer.carriers.threads import ThreadInflow
from hotweights.transfer.endpoint import endpoint_of
from hotweights.transfer.peers import Peer
from hotweights.transfer.relay import Relay
from hotweights.transfer.shared_memory import OwnSlots, WriteSlots

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
    finish = process_group.GroupEnd.finish

    def changing(end):
        _, piece = end._begun[0]
        finish(end)
        if not end._sends:
            piece[0] ^= 1

    monkeypatch.setattr(process_group.GroupEnd, "finish", changing)
    with sender(address, carrier="pg") as sending, receiver(address) as source:
        waiting = Thread(lambda: dict(source.tensors()))
        with pytest.raises(hw.TransferAborted, match=r"a: \w+ was sent, \w+ was copied"):
            sending.send({"a": torch.arange(5.0)}, version=1)
        with pytest.raises(hw.TransferError, match="is not what the sender held"):
            waiting.result()


@pytest.mark.parametrize("name", NAMES[1:])
def test_what_follows_comes_while_a_slot_is_used(name, address, monkeypatch):
    """A library's thread goes on meanwhile: the receiver has told it of the slots behind this one."""
    numbers = {f"{number}": torch.full((1 << 10,), float(number)) for number in range(6)}
    told, flows, hand_over, expect = threading.Semaphore(0), [], Peer.hand_over, ThreadInflow.expect
    monkeypatch.setattr(Peer, "hand_over", lambda peer, *what: (hand_over(peer, *what), told.release()))
    monkeypatch.setattr(ThreadInflow, "expect", lambda flow, *what: (expect(flow, *what), flows.append(flow)))
    slots = {"slots": 4, "slot_nbytes": 1 << 12, "digests": False}
    with sender(address, carrier=name, **slots) as sending, receiver(address) as source:
        sent = Thread(lambda: sending.send(numbers, version=1))
        with source.leases() as stream:
            taken = [next(stream).own()]
            for _ in range(4):
                assert told.acquire(timeout=TIMEOUT)
            taken.append(next(stream).own())
            assert len(flows) == 4  # this one, and two behind it
            until = time.monotonic() + TIMEOUT
            while flows[0]._mover.lacking:
                assert time.monotonic() < until, "nothing comes while nobody looks"
            taken.extend(lease.own() for lease in stream)
        sent.result()
    assert_same_bits(dict(zip(numbers, taken, strict=True)), numbers)


# Whoever dies, stands still or is cut off while bytes are on their way: nothing waits for a library.


class Wide(torch.nn.Module):
    """More than two slots, and more than the kernels of two ends keep."""

    def __init__(self, value=0.0):
        super().__init__()
        self.one = torch.nn.Parameter(torch.full((24, 1 << 18), float(value)), requires_grad=False)


OFTEN = [pytest.param("sockets", marks=pytest.mark.long), *NAMES[1:]]  # Sockets have tests of their own.
SLOTS = {"slots": 2, "slot_nbytes": 8 << 20}


def work(pipe, address, host=None, at_version_2=None):
    """Take versions until the last, and say what is live; in the midst of the second one do something, once."""
    if host is not None:
        enter(host)
    live, expect, things = hw.LiveModel(Wide()), OwnSlots.expect, [at_version_2] if at_version_2 else []

    def expecting(slots, filled):
        expect(slots, filled)
        if live.version == 1 and things:
            things.pop()(pipe)

    OwnSlots.expect = expecting
    with receiver(address, insecure=host is not None, timeout=5, offer_timeout=60) as source:
        while live.version != "last":
            said = ""
            try:
                live.load(source) if live.version is None else live.update(source)
            except hw.UpdateAborted as error:
                said = f"{type(error.__cause__).__name__}: {error.__cause__}"
            pipe.send((live.version, value_of(live.model), said))


def die(pipe):
    os.kill(os.getpid(), signal.SIGKILL)


def stand_still(pipe):
    os.kill(os.getpid(), signal.SIGSTOP)


def be_cut_off(pipe):
    pipe.send("cut")
    pipe.recv()


@pytest.mark.parametrize("name", OFTEN)
@pytest.mark.parametrize(
    "happens", [pytest.param(die, id="dies"), pytest.param(stand_still, id="stands still", marks=pytest.mark.long)]
)
def test_a_receiver_is_lost_in_the_midst_and_the_others_go_on(happens, name, address):
    with (
        Child(work, address) as other,
        Child(work, address, None, happens) as victim,
        sender(address, receivers=2, carrier=name, **{**SLOTS, "timeout": 4.0}) as sending,
    ):
        sending.send(Wide(1), version=1)
        assert victim.heard() == other.heard() == (1, 1.0, "")
        began = time.monotonic()
        with pytest.raises(hw.TransferAborted, match=f"{victim.name} on 127.0.0.1"):
            sending.send(Wide(2), version=2)
        assert time.monotonic() - began < 3 * 4.0
        version, value, said = other.heard()
        assert (version, value) == (1, 1.0)
        assert victim.name in said
        assert len(sending.send(Wide(3), version="last", receivers=1).committed) == 1
        assert other.heard() == ("last", 3.0, "")
        victim.process.kill()


def send_and_die(pipe, address, name):
    with sender(address, carrier=name, **SLOTS) as sending:
        sending.send(Wide(1), version=1)
        hand_over = Peer.hand_over

        def dying(peer, *what):
            hand_over(peer, *what)
            pipe.recv()  # The receiver has some of it by then.
            die(pipe)

        Peer.hand_over = dying
        sending.send(Wide(2), version=2)


def say_so(pipe):
    pipe.send("here")


@pytest.mark.parametrize("name", OFTEN)
def test_a_sender_is_lost_in_the_midst_and_the_next_one_goes_on(name, address):
    with Child(work, address, None, say_so) as worker, Child(send_and_die, address, name) as trainer:
        assert worker.heard() == (1, 1.0, "")
        assert worker.heard() == "here"
        trainer.say("die")
        version, value, said = worker.heard()
        assert (version, value) == (1, 1.0)
        assert said.startswith("PeerLost")
        with sender(address, carrier=name, **SLOTS) as sending:
            sending.send(Wide(3), version="last")
            assert worker.heard() == ("last", 3.0, "")


def send_three(pipe, host, address, name):
    enter(host)
    with sender(address, insecure=True, carrier=name, **SLOTS) as sending:
        sending.send(Wide(1), version=1)
        began = time.monotonic()
        try:
            said = str(sending.send(Wide(2), version=2))
        except hw.TransferError as error:
            said = f"{type(error).__name__}: {error}"
        pipe.send((said, time.monotonic() - began))
        pipe.recv()
        sending.send(Wide(3), version="last")


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_link_that_is_cut_in_the_midst_is_noticed_at_both_ends(name, hosts):
    address = f"tcps://{hosts.addresses[2]}:7600"
    # UCX notes its namespace once, for a process and those forked from it; then both ends would be one host to it.
    fresh = name == "nixl"
    with (
        Child(send_three, hosts.names[2], address, name, fresh=fresh) as trainer,
        Child(work, address, hosts.names[0], be_cut_off, fresh=fresh) as worker,
    ):
        try:
            assert worker.heard(30) == (1, 1.0, "")
            assert worker.heard(30) == "cut"
            hosts.link(0, "down")
            worker.say("go on")
            said, seconds = trainer.heard(60)
            assert said.startswith("TransferAborted")
            assert "on 10.77.0.1" in said
            assert seconds < 20.0
            version, value, said = worker.heard(60)
            assert (version, value) == (1, 1.0)
            assert said
        finally:
            hosts.link(0, "up")
        trainer.say("go on")
        assert worker.heard(60) == ("last", 3.0, "")
