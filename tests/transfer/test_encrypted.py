"""``encrypt="all"``: weights go through TLS too. Who listens reads nothing; who has no key of the job gets nothing."""

import contextlib
import select
import socket
import ssl
import threading

import pytest
import torch
from ends import Thread, receiver, sender, tensors

import hotweights as hw
from hosts import free_address
from hotweights.testing import TRANSPORT_CONTRACT, assert_same_bits
from hotweights.transfer.carriers.tls import TlsInflow
from hotweights.transfer.keys import Keys
from hotweights.transfer.relay import Relay

SECRET = torch.arange(50_000, dtype=torch.int32)  # larger than what TLS puts into a record
SEEN = SECRET.numpy().tobytes()[4000:4400]


@pytest.fixture
def address():
    return free_address()


class Network:
    def __init__(self, address, keys):
        self._address, self._keys = address, keys

    def sender(self, receivers):
        return sender(self._address, receivers=receivers, keys=self._keys, encrypt="all")

    def receiver(self):
        return receiver(self._address, keys=self._keys)


@pytest.mark.parametrize("check", TRANSPORT_CONTRACT, ids=lambda check: check.__name__)
def test_it_is_a_transport(check, jobs, address):
    check(lambda: Network(address, jobs[0]), tensors())


class Listening:
    """Who listens on the wire: connections to its address go on to a sender's, and all that passes is kept."""

    def __init__(self, to):
        self._to = ("127.0.0.1", int(to.rpartition(":")[2]))
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcps://127.0.0.1:{self._socket.getsockname()[1]}"
        self.heard, self._ends = bytearray(), {}
        self._bell, self._rung = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        with contextlib.ExitStack() as stack:
            while True:
                for ready in select.select([self._socket, self._rung, *self._ends], [], [])[0]:
                    if ready is self._rung:
                        return
                    if ready is self._socket:
                        one = stack.enter_context(self._socket.accept()[0])
                        try:
                            other = stack.enter_context(socket.create_connection(self._to))
                        except ConnectionRefusedError:  # The sender is not there yet, or no more.
                            one.close()
                            continue
                        self._ends |= {one: other, other: one}
                    elif ready in self._ends:
                        self._pass_on(ready)

    def _pass_on(self, ready):
        with contextlib.suppress(OSError):
            if said := ready.recv(1 << 20):
                self.heard += said
                self._ends[ready].sendall(said)
                return
        for end in (ready, self._ends.pop(ready)):
            self._ends.pop(end, None)
            end.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._bell.send(b"x")
        self._thread.join(10)
        for each in (self._socket, self._bell, self._rung):
            each.close()


def take(address, **options):
    with receiver(address, **options) as source:
        return dict(source.tensors())


@pytest.mark.parametrize("encrypt", ["control", "all"])
def test_who_listens_reads_weights_only_where_they_are_not_encrypted(encrypt, jobs, address):
    with (
        sender(address, keys=jobs[0], encrypt=encrypt, slot_nbytes=1 << 20) as sending,
        Listening(address) as wire,
    ):
        taking = Thread(lambda: take(wire.address, keys=jobs[0]))
        sending.send({"a": SECRET}, version=1)
        assert_same_bits(taking.result(), {"a": SECRET})
    assert len(wire.heard) > SECRET.nbytes
    assert (SEEN in wire.heard) is (encrypt == "control")


def test_a_relay_encrypts_what_it_hands_on(jobs, address):
    second = free_address()
    with (
        sender(address, keys=jobs[0], encrypt="all", slot_nbytes=1 << 20) as sending,
        Relay(address, second, keys=jobs[0]) as relay,
        Listening(second) as wire,
    ):
        running = Thread(relay.run)
        taking = Thread(lambda: take(wire.address, keys=jobs[0]))
        sending.send({"a": SECRET}, version=1)
        assert_same_bits(taking.result(), {"a": SECRET})
        relay.close()
        running.result()
    assert len(wire.heard) > SECRET.nbytes
    assert SEEN not in wire.heard


def test_who_shows_a_good_token_and_no_key_of_the_job_gets_nothing(jobs, address, monkeypatch):
    protect = TlsInflow.protect
    stranger = Keys(jobs[1]).connecting(["127.0.0.1"])
    stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE  # It takes any sender.
    monkeypatch.setattr(TlsInflow, "protect", lambda flow, context, host: protect(flow, stranger, host))
    with (
        sender(address, keys=jobs[0], encrypt="all", slot_nbytes=1 << 20) as sending,
        Listening(address) as wire,
    ):
        taking = Thread(lambda: take(wire.address, keys=jobs[0]))
        with pytest.raises(hw.TransferAborted, match=r"(?i)certificate"):
            sending.send({"a": SECRET}, version=1)
        with pytest.raises(hw.TransferError):
            taking.result()
    assert len(wire.heard) < SECRET.nbytes


def test_a_sender_of_another_job_is_not_believed(jobs, address, monkeypatch):
    protect = TlsInflow.protect
    other = Keys(jobs[1]).connecting(["127.0.0.1"])
    monkeypatch.setattr(TlsInflow, "protect", lambda flow, context, host: protect(flow, other, host))
    with sender(address, keys=jobs[0], encrypt="all") as sending:
        taking = Thread(lambda: take(address, keys=jobs[0]))
        with pytest.raises(hw.TransferAborted):
            sending.send({"a": SECRET}, version=1)
        with pytest.raises(hw.TransferError, match=r"(?i)certificate|unknown ca"):  # By itself, or from the sender.
            taking.result()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, r"needs keys=.*hotweights keys DIR --hosts 127.0.0.1"),
        ({"carrier": "pg"}, "what 'pg' brings is not encrypted"),
        ({"group": object()}, "not for group="),
        ({"encrypt": "some"}, "known are: all, control"),
    ],
)
def test_where_something_would_go_unencrypted_it_is_refused(options, words, address):
    with pytest.raises(hw.UsageError, match=words):
        sender(address, **{"encrypt": "all", **options})


def test_on_one_host_there_is_nothing_to_encrypt(tmp_path):
    with pytest.raises(hw.UsageError, match="on this one; leave it out"):
        sender(f"unix:{tmp_path / 'run' / 'socket'}", encrypt="all")
    with pytest.raises(hw.UsageError, match=r"encrypt=: nobody connects"):
        hw.Sender(tmp_path, encrypt="all")
