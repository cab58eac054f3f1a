"""Where the ends of a transfer meet in tests."""

import contextlib
import gc
import os
import threading
import time

import pytest
import torch
from namespaces import Hosts, why_not


@pytest.fixture
def address(tmp_path):
    """An address that nobody has."""
    return f"unix:{tmp_path / 'run' / 'socket'}"


def held():
    """Descriptors and mappings of transfers that this process holds, and its threads."""
    for _ in range(3):  # What a generator held goes only after the generator.
        gc.collect()
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the directory's own
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    with open("/proc/self/maps") as maps:
        mapped = sum("hotweights" in line for line in maps)
    kinds = ("socket", "/memfd:hotweights", "anon_inode:[eventfd]")
    return (
        [sum(link.startswith(kind) for link in links) for kind in kinds],
        mapped,
        threading.active_count(),
    )


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
    """After each test descriptors, mappings and threads are as before it."""
    torch.set_num_threads(1)
    before = held()
    yield
    until = time.monotonic() + 60  # obstore closes its sockets in a thread of its own, some time after its last user.
    while (after := held()) != before and time.monotonic() < until:
        pass
    assert after == before
