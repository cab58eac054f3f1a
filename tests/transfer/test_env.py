"""``env:``: what torchrun, Slurm or a user has put into the environment. Errors name the variable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ends import Thread, receiver, sender
from processes import Tiny, value_of

import hotweights as hw
from hosts import free_address, where
from hotweights.transfer.endpoint import endpoint_of, is_local
from hotweights.transfer.env_address import named
from hotweights.transfer.relay import Relay
from hotweights.transfer.resolve import Resolver

VARIABLES = (
    "HOTWEIGHTS_ADDRESS",
    "HOTWEIGHTS_PORT",
    "HOTWEIGHTS_KEYS",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_JOB_NODELIST",
)


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(
    ("environment", "address"),
    [
        ({"HOTWEIGHTS_ADDRESS": "unix:/tmp/hw/socket", "MASTER_ADDR": "gpu1"}, "unix:/tmp/hw/socket"),
        ({"HOTWEIGHTS_ADDRESS": "tcps://trainer:7600"}, "tcps://trainer:7600"),
        ({"MASTER_ADDR": "gpu1", "MASTER_PORT": "29500", "HOTWEIGHTS_PORT": "7600"}, "tcps://gpu1:7600"),
        ({"MASTER_ADDR": "fd00::1", "HOTWEIGHTS_PORT": "7600"}, "tcps://[fd00::1]:7600"),
        ({"SLURM_JOB_NODELIST": "gpu7", "HOTWEIGHTS_PORT": "7600"}, "tcps://gpu7:7600"),
        ({"SLURM_JOB_NODELIST": "gpu[07-09,12],big1", "HOTWEIGHTS_PORT": "7600"}, "tcps://gpu07:7600"),
        ({"SLURM_JOB_NODELIST": "big1,gpu[07-09]", "HOTWEIGHTS_PORT": "7600"}, "tcps://big1:7600"),
        ({"SLURM_JOB_NODELIST": "rack[3,5]-a,big1", "HOTWEIGHTS_PORT": "7600"}, "tcps://rack3-a:7600"),
        ({"MASTER_ADDR": "gpu1", "SLURM_JOB_NODELIST": "gpu[2-3]", "HOTWEIGHTS_PORT": "7600"}, "tcps://gpu1:7600"),
    ],
)
def test_an_address_is_found(environment, address):
    assert named("env:", environment).address == address


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "HOTWEIGHTS_ADDRESS.*MASTER_ADDR.*SLURM_JOB_NODELIST.*None of them is set"),
        ({"HOTWEIGHTS_ADDRESS": "env:"}, "HOTWEIGHTS_ADDRESS is 'env:', which refers to itself"),
        ({"HOTWEIGHTS_ADDRESS": "trainer:7600"}, "by HOTWEIGHTS_ADDRESS: an address looks like"),
        ({"HOTWEIGHTS_ADDRESS": "s3://bucket/run"}, "by HOTWEIGHTS_ADDRESS: an address looks like"),
        ({"MASTER_ADDR": "gpu1"}, "MASTER_ADDR says .* gpu1, and HOTWEIGHTS_PORT does not .* export HOTWEIGHTS_PORT="),
        ({"SLURM_JOB_NODELIST": "gpu[1-2]"}, "SLURM_JOB_NODELIST says .* gpu1, and HOTWEIGHTS_PORT"),
        ({"SLURM_JOB_NODELIST": ",gpu1", "HOTWEIGHTS_PORT": "1"}, "SLURM_JOB_NODELIST is ',gpu1'"),
        ({"MASTER_ADDR": "gpu1", "HOTWEIGHTS_PORT": "http"}, "HOTWEIGHTS_PORT is 'http'; a port is a number"),
        ({"MASTER_ADDR": "gpu1", "HOTWEIGHTS_PORT": "70000"}, "HOTWEIGHTS_PORT is '70000'"),
        (
            {"MASTER_ADDR": "gpu1", "HOTWEIGHTS_PORT": "29500", "MASTER_PORT": "29500"},
            "HOTWEIGHTS_PORT and MASTER_PORT",
        ),
        ({"MASTER_ADDR": "gpu1", "HOTWEIGHTS_PORT": "7600"}, "by MASTER_ADDR: .*HOTWEIGHTS_KEYS=DIR"),
        ({"MASTER_ADDR": "gpu1", "HOTWEIGHTS_PORT": "7600", "HOTWEIGHTS_KEYS": "/nowhere"}, "no keys in /nowhere"),
    ],
)
def test_what_is_wrong_is_told_by_the_variable(environment, said, monkeypatch):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    for make in (hw.Sender, hw.Receiver, Resolver):
        with pytest.raises(hw.UsageError, match=said):
            make("env:")


def test_it_stands_alone():
    with pytest.raises(hw.UsageError, match="env: stands alone"):
        hw.Receiver("env:job")


@pytest.mark.parametrize("kind", ["unix", "tcps"])
def test_both_ends_find_each_other(kind, address, monkeypatch):
    monkeypatch.setenv("HOTWEIGHTS_ADDRESS", address if kind == "unix" else free_address())
    monkeypatch.setenv("HOTWEIGHTS_KEYS", "/nowhere" if kind == "unix" else "")
    live = hw.LiveModel(Tiny())
    with sender("env:") as sending, receiver("env:") as source:
        worker = Thread(lambda: live.load(source))
        sending.send(Tiny(1), version=1)
        worker.result()
    assert (live.version, value_of(live.model)) == (1, 1.0)


def test_keys_come_from_the_environment(tmp_path, monkeypatch):
    pytest.importorskip("cryptography")
    from hotweights.transfer.keys import make_keys

    make_keys(tmp_path / "keys", ["127.0.0.1"])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("HOTWEIGHTS_PORT", str(where(free_address())[1]))
    monkeypatch.setenv("HOTWEIGHTS_KEYS", str(tmp_path / "keys"))
    live = hw.LiveModel(Tiny())
    with sender("env:") as sending, receiver("env:") as source:
        worker = Thread(lambda: live.load(source))
        assert "on 127.0.0.1" in sending.send(Tiny(1), version=1).committed[0]
        worker.result()
    with sender("env:", timeout=0.5) as sending, receiver(sending.address) as stranger:
        other = Thread(lambda: hw.LiveModel(Tiny()).load(stranger))
        with pytest.raises(hw.TransferTimeout, match="TLS"):
            sending.send(Tiny(1), version=1)
        stranger.close()
        with pytest.raises(hw.HotweightsError):
            other.result()


def test_a_relay_and_a_local_address_by_the_environment(address, monkeypatch):
    monkeypatch.setenv("HOTWEIGHTS_ADDRESS", address)
    assert is_local("env:")
    with pytest.raises(hw.UsageError, match="a relay is for what comes from another host"):
        Relay("env:", address)
    monkeypatch.setenv("HOTWEIGHTS_ADDRESS", free_address())
    assert not is_local("env:")
    live = hw.LiveModel(Tiny())
    with sender("env:") as sending, Relay("env:", address) as relay, receiver(address) as source:
        running, worker = Thread(relay.run), Thread(lambda: live.load(source))
        sending.send(Tiny(1), version=1)
        worker.result()
        relay.close()
        running.result()
    assert value_of(live.model) == 1.0


SCRIPT = """
import os, torch
import hotweights as hw

rank = int(os.environ["RANK"])
torch.manual_seed(rank)
model = torch.nn.Linear(8, 8)
if rank == 0:
    with hw.Sender("env:") as sender:
        said = sender.send(model, version="step-1").committed[0]
else:
    live = hw.LiveModel(model)
    with hw.Receiver("env:", name=f"rank{rank}") as receiver:
        live.load(receiver)
    torch.manual_seed(0)
    assert all(map(torch.equal, live.model.parameters(), torch.nn.Linear(8, 8).parameters()))
    said = live.version
with open(f"{rank}.said", "w") as file:
    file.write(said)
"""


def test_two_processes_of_torchrun(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(hw.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "HOTWEIGHTS_PORT": str(where(free_address())[1]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command += [f"--master-port={where(free_address())[1]}", str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "0.said").read_text().startswith("rank1 (process")
    assert (tmp_path / "1.said").read_text() == "step-1"


def test_an_unknown_scheme_names_those_there_are():
    with pytest.raises(hw.UsageError, match=r"unix:.* tcps:.* env:"):
        endpoint_of("http://trainer:7600")
