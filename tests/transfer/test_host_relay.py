"""Receivers of a host that type the same line share one relay, which the first of them starts."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from ends import Thread, receiver, sender
from processes import Child

import hotweights as hw
from hosts import free_address
from hotweights.testing import assert_same_bits
from hotweights.transfer import host_relay
from hotweights.transfer.host_relay import folder_of
from hotweights.transfer.keys import make_keys

CONTENT = {"w": torch.arange(40_000.0)}
PATIENCE = 60.0  # seconds in which a process starts, on a busy machine


@pytest.fixture(autouse=True)
def soon(monkeypatch, tmp_path):
    """A relay ends soon after its last receiver; its folders lie where the test's other files do."""
    monkeypatch.setattr(host_relay, "IDLE", 0.4)
    monkeypatch.setattr(host_relay.tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def tmp_path():
    """One whose name is short: a socket's path has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="hw-", dir="/tmp") as folder:
        yield Path(folder)


def test_a_long_name_of_the_directory_for_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(host_relay.tempfile, "tempdir", str(tmp_path / ("long" * 30)))
    place = folder_of("tcps://127.0.0.1:1", None, True)
    assert place.parent == Path("/tmp")


@pytest.fixture
def keys(tmp_path):
    make_keys(tmp_path / "keys", ["127.0.0.1"])
    return tmp_path / "keys"


def take(source):
    return dict(source.tensors())


def relays(tmp_path):
    """The processes of relays whose folders are the test's."""
    found = subprocess.run(["pgrep", "-f", f"host_relay import serve.* {tmp_path}/"], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def gone(tmp_path):
    until = time.monotonic() + PATIENCE
    while relays(tmp_path) or list(tmp_path.glob("hotweights-*")):
        assert time.monotonic() < until, "a relay stays for ever"


@contextlib.contextmanager
def two(address, keys):
    options = {"keys": keys, "relay": True, "keep": "1MB", "offer_timeout": PATIENCE, "timeout": PATIENCE}
    with receiver(address, name="first", **options) as first, receiver(address, name="second", **options) as second:
        yield first, second


@pytest.mark.long
def test_two_workers_share_one_that_ends_after_them_and_comes_again_when_killed(keys, tmp_path):
    address = free_address()
    with two(address, keys) as (first, second), sender(address, keys=keys, receivers=2, timeout=PATIENCE) as sending:
        for version in (1, 2):
            threads = [Thread(take, each) for each in (first, second)]
            report = sending.send(CONTENT, version=version)
            for thread in threads:
                assert_same_bits(thread.result(), CONTENT)
            (process,) = relays(tmp_path)
            assert len(report.committed) == 2
            assert report.nbytes <= report.network_nbytes < report.nbytes + 4096  # once
            if version == 1:
                os.kill(process, signal.SIGKILL)
                with contextlib.suppress(hw.TransferAborted):  # Who was there is gone; the next send waits for another.
                    sending.send(CONTENT, version="lost")
        first.close()
        threads = [Thread(take, second)]
        sending.send(CONTENT, version=3, receivers=1)
        assert_same_bits(threads[0].result(), CONTENT)
        with receiver(address, name="late", keys=keys, relay=True) as late:  # The relay keeps what it had last.
            assert_same_bits(take(late), CONTENT)
            assert late.version == 3
    gone(tmp_path)


def start_and_take(pipe, address, keys):
    with receiver(address, keys=keys, relay=True, offer_timeout=PATIENCE) as source:
        while True:
            pipe.send(sorted(take(source)))


@pytest.mark.long
def test_a_relay_outlives_the_worker_that_started_it(keys, tmp_path):
    address = free_address()
    with (
        sender(address, keys=keys, receivers=2, timeout=PATIENCE) as sending,
        receiver(address, keys=keys, relay=True, offer_timeout=PATIENCE) as second,
    ):
        first = Child(start_and_take, address, keys)
        while not relays(tmp_path):  # The second has not asked for anything yet.
            assert sending.connected == ()
        thread = Thread(take, second)
        sending.send(CONTENT, version=1)
        assert first.heard(PATIENCE) == sorted(CONTENT)
        thread.result()
        (process,) = relays(tmp_path)
        first.process.kill()
        with pytest.raises(AssertionError), first:  # It kills and waits.
            raise AssertionError
        thread = Thread(take, second)
        report = sending.send(CONTENT, version=2, receivers=1)
        assert_same_bits(thread.result(), CONTENT)
        assert len(report.committed) == 1
        assert relays(tmp_path) == [process]
    gone(tmp_path)


def test_why_a_relay_ended_is_told_to_its_workers(keys, tmp_path):
    make_keys(tmp_path / "others", ["127.0.0.1"])
    options = {"keys": tmp_path / "others", "relay": True, "offer_timeout": PATIENCE}
    with sender("tcps://127.0.0.1:0", keys=keys) as sending, receiver(sending.address, **options) as source:
        thread = Thread(take, source)
        until = time.monotonic() + PATIENCE
        while thread.is_alive() and time.monotonic() < until:
            assert sending.connected == ()
        with pytest.raises(hw.TransferError, match=r"this host's relay ended.*certificate"):
            thread.result()
    gone(tmp_path)


def test_there_is_one_for_each_address_user_namespace_and_directory_of_keys(monkeypatch, tmp_path):
    known = {
        folder_of("tcps://a:1", None, True),
        folder_of("tcps://a:2", None, True),
        folder_of("tcps://a:1", "k", False),
    }
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    known.add(folder_of("tcps://a:1", None, True))
    monkeypatch.setattr(os, "stat", lambda path, stat=os.stat: stat("/" if path.startswith("/proc") else path))
    known.add(folder_of("tcps://a:1", None, True))
    assert len(known) == 5


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    address = free_address()
    folder_of(address, None, False).mkdir(mode=0o777)
    folder_of(address, None, False).chmod(0o777)
    with receiver(address, relay=True) as source, pytest.raises(hw.UsageError, match="not this user's alone"):
        source.poll()


def test_a_link_in_its_place_is_refused(tmp_path):
    address = free_address()
    (tmp_path / "mine").mkdir(mode=0o700)
    folder_of(address, None, False).symlink_to(tmp_path / "mine")
    with receiver(address, relay=True) as source, pytest.raises(hw.UsageError, match="is a link"):
        source.poll()
    assert not list((tmp_path / "mine").iterdir())


def test_it_is_for_addresses_on_the_network(address, tmp_path):
    with pytest.raises(hw.UsageError, match="relay= is for senders on other hosts"):
        hw.Receiver(address, relay=True)
    with pytest.raises(hw.UsageError, match="relay="):
        hw.Receiver(tmp_path, relay=True)
    with pytest.raises(hw.UsageError, match="keep= is for relay=True"):
        hw.Receiver("tcps://127.0.0.1:1", keep="1MB")
    with pytest.raises(hw.UsageError, match=r"keep= is a number of bytes, or such as"):
        hw.Receiver("tcps://127.0.0.1:1", relay=True, keep="much")
    with pytest.raises(hw.UsageError, match="keep="):
        hw.Receiver(tmp_path, keep="1MB")


def test_two_jobs_that_both_say_env_have_a_relay_each(monkeypatch, tmp_path, keys):
    """The environment says which job; the relay, a process of its own, is told what it says."""
    folders = []
    for number in (1, 2):
        monkeypatch.setenv("HOTWEIGHTS_ADDRESS", f"tcps://127.0.0.1:{number}")
        monkeypatch.setenv("HOTWEIGHTS_KEYS", str(keys))
        folders.append(host_relay.HostRelay("env:")._folder)
    assert folders == [folder_of(f"tcps://127.0.0.1:{number}", keys, False) for number in (1, 2)]
    monkeypatch.setenv("HOTWEIGHTS_ADDRESS", "ray:job")
    with pytest.raises(hw.UsageError, match="at ray:job each node has a relay already; leave it out"):
        hw.Receiver("env:", relay=True)


def test_a_relay_is_of_the_same_hotweights_as_who_starts_it(tmp_path):
    """Another one may be installed, of another protocol."""
    (tmp_path / "hotweights").mkdir()
    (tmp_path / "hotweights" / "__init__.py").write_text("raise ImportError('this is another one')")
    start = host_relay._START.replace("serve(*sys.argv[2:])", "print(serve.__code__.co_filename)")
    command = [sys.executable, "-c", start, str(host_relay._PACKAGE)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip() == host_relay.__file__, done.stderr
