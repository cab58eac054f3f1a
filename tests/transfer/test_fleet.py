"""A fleet on paper."""

import json

import pytest
import torch
from typer.testing import CliRunner

import hotweights as hw
from hotweights.cli import app
from hotweights.testing import write_checkpoint
from hotweights.transfer.fleet import fleet_of


def test_a_trillion_parameters_on_125_hosts():
    fast, slow = fleet_of("").as_dict(), fleet_of("gbits=100").as_dict()
    assert (fast["host_nbytes"], fast["network_nbytes"]) == (500e9, 62.5e12)
    assert fast["seconds_into_a_host"] == 1.25
    assert round(fast["seconds_from_trainers"], 1) == 4.9
    assert 1.3 < fast["seconds_by_chains"] < 1.6
    assert (slow["seconds_into_a_host"], round(slow["seconds_from_trainers"])) == (40.0, 156)
    assert fleet_of("gbits=400").as_dict()["seconds_from_one_host"] == 1250
    assert fleet_of("slot=4194304").as_dict()["messages_per_host"] // 2 == 119_213  # hence larger ones


def test_one_host_and_one_trainer_need_no_chain():
    facts = fleet_of("hosts=1,trainer_hosts=1,hosts_per_copy=1").as_dict()
    assert facts["seconds_by_chains"] == facts["seconds_from_trainers"] == facts["seconds_into_a_host"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("host=3", "no 'host'; it has parameters"),
        ("hosts=0", "above zero"),
        ("hosts=x", "'hosts=x'"),
        ("hosts=4,hosts_per_copy=8", "hosts_per_copy=8 hosts, and there are hosts=4"),
    ],
)
def test_what_is_no_fleet_is_told(words, said):
    with pytest.raises(hw.UsageError, match=said):
        fleet_of(words)


def test_a_copy_lies_on_as_many_hosts_as_there_are():
    assert fleet_of("hosts=2").per_host == fleet_of("hosts=2,hosts_per_copy=2").per_host


def run(*words):
    return CliRunner().invoke(app, ["plan", *map(str, words)])


def test_as_a_command(tmp_path):
    said = run("--fleet", "hosts=125")
    assert said.exit_code == 0, said.output
    assert "62.5 TB to 125 relays" in said.output
    assert json.loads(run("--fleet", "gbits=100", "--json").output)["seconds_into_a_host"] == 40.0
    write_checkpoint(tmp_path, {"w": torch.ones(1000), "v": torch.ones(10)})
    of = json.loads(run(tmp_path, "--fleet", "hosts=2,hosts_per_copy=1", "--json").output)
    assert (of["host_nbytes"], of["tensors"]) == (4040, 2)


def test_wrong_usage_is_told(tmp_path):
    assert run("--fleet", "host=1").exit_code == 2
    assert run().exit_code == 2
    said = run(tmp_path)
    assert said.exit_code == 2
    assert "--model" in said.output
