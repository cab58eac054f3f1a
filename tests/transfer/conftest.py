"""Where the ends of a transfer meet in tests."""

import contextlib
import gc
import os
import threading
import time

import pytest
import torch
from namespaces import Hosts, why_not

from hosts import free_address


@pytest.fixture
def address(tmp_path):
    """An address that nobody has."""
    return f"unix:{tmp_path / 'run' / 'socket'}"


@pytest.fixture
def trainer():
    """The trainer's address, of a host."""
    return free_address()


@pytest.fixture
def worker(address):
    """The address of the relay, for workers."""
    return address


def held():
    """Descriptors, mappings and threads of transfers that this process has, each by a name of its own."""
    for _ in range(3):  # What a generator held goes only after the generator.
        gc.collect()
    names = {f"thread {thread.ident} {thread.name}" for thread in threading.enumerate()}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the directory's own
            names |= descriptor_name(number)
    with open("/proc/self/maps") as maps:
        return names | {f"mapping {line.strip()}" for line in maps if "hotweights" in line}


def descriptor_name(number):
    """The name of a descriptor that a transfer may leave: a number alone is soon given to another."""
    link = os.readlink(f"/proc/self/fd/{number}")
    if link.startswith("socket"):
        return {link}
    if link.startswith("/memfd:hotweights"):
        return {f"{link} {os.stat(f'/proc/self/fd/{number}').st_ino}"}
    if link == "anon_inode:[eventfd]":
        with open(f"/proc/self/fdinfo/{number}") as about:
            return {line.strip() for line in about if line.startswith("eventfd-id")}
    return set()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """The keys of two jobs."""
    pytest.importorskip("cryptography")
    from hotweights.transfer.keys import make_keys

    directories = [tmp_path_factory.mktemp(name) / "keys" for name in ("one", "two")]
    for directory in directories:
        make_keys(directory, ["127.0.0.1", "elsewhere"])
    return directories


@pytest.fixture(scope="module")
def hosts():
    """Three hosts, which are network namespaces."""
    if reason := why_not():
        pytest.skip(reason)
    with Hosts() as made:
        yield made


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """What other tests have left is not looked through again after each test: that took most of their time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_left():
    """After each test no descriptor, mapping or thread is left that was not there before it.

    What went meanwhile is no fault: obstore closes its sockets in a thread of its own, some time after their last user.
    """
    torch.set_num_threads(1)
    before = held()
    yield
    until = time.monotonic() + 60
    while (left := held() - before) and time.monotonic() < until:
        pass
    assert not left
