"""Forked children: torch's threads stayed in the parent, and nobody waits for them."""

import os
import subprocess
import sys

import pytest
import torch

from hotweights import forked
from hotweights.forked import alone_in_a_fork

# In a process of its own: the parent must have used torch's threads before it forks.
SCRIPT = """
import os, signal, sys, torch, hotweights as hw
from torch import nn

torch.set_num_threads(2)
size = 1024  # torch shares out what is larger than 32,768 numbers
model = nn.Sequential(nn.Linear(size, size), nn.Linear(size, size))
new = {name: tensor + 1 for name, tensor in model.state_dict().items()}
live = hw.LiveModel(model, atomic=sys.argv[1])
live.load(new, version=1)
assert torch.get_num_threads() == 2
child = os.fork()
signal.alarm(100)  # Who waits for ever is killed.
if child:
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
hw.load(nn.Sequential(nn.Linear(size, size), nn.Linear(size, size)), new)
live.update(new, version=2)
with live.begin() as update:
    update.feed(new)
    update.prepare()
    update.commit(version=3)
with live.begin() as update:
    update.feed(new)
assert torch.get_num_threads() == 2
torch.set_num_threads(1)
assert live.version == 3 and all(torch.equal(model.state_dict()[name], tensor) for name, tensor in new.items())
os._exit(0)
"""


@pytest.mark.parametrize("atomic", ["staged", "journal"])
def test_a_large_update_in_a_forked_child_ends(atomic):
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, atomic], env=environment, timeout=120, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


def test_only_there_and_only_for_the_while(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with alone_in_a_fork():
            assert torch.get_num_threads() == 3
        monkeypatch.setattr(forked, "_IMPORTED_IN", os.getppid())
        inside = alone_in_a_fork()(torch.get_num_threads)
        assert inside() == 1
        with pytest.raises(KeyError), alone_in_a_fork():
            raise KeyError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
