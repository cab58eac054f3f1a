"""The commands and the sender take a DCP directory as they take files."""

import json
from pathlib import Path

import pytest
import torch
from dcp_saved import InParts, save_dcp
from ends import Thread, receiver, sender
from typer.testing import CliRunner

import hotweights as hw
from hotweights.cli import app
from hotweights.testing import assert_same_bits

runner = CliRunner()


def run(*args, code=0):
    result = runner.invoke(app, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def tensors():
    return {"0.weight": torch.randn(30, 20), "0.bias": torch.randn(30), "1.weight": torch.randn(20, 30)}


@pytest.fixture
def folder(tmp_path, tensors):
    state = {"0.weight": InParts(tensors["0.weight"], ([7], [])), "1.weight": InParts(tensors["1.weight"], ([], [11]))}
    model = {**tensors, **state}
    return save_dcp(tmp_path / "step-1", {"model": model, "optim": {"state": {"x": torch.ones(2)}}, "step": 1}, files=2)


def test_inspect(folder):
    output = run("inspect", folder)
    assert "0.weight" in output
    assert "3 tensors (3 F32), 4.9 kB in 3 files" in output
    said = json.loads(run("inspect", folder, "--json"))
    assert {tensor["name"] for tensor in said["tensors"]} == {"0.weight", "0.bias", "1.weight"}
    assert said["metadata"] == {str(folder / ".metadata"): {"step": "no tensor"}}
    assert "1 tensor (1 F32)" in run("inspect", folder, "--subfolder", "optim")
    assert run("inspect", folder.parent, "--subfolder", "step-1") == output


def test_verify_and_diff(folder, tensors, tmp_path):
    hw.save(tensors, tmp_path / "files")
    run("verify", folder, "--write", tmp_path / "digests")
    run("verify", tmp_path / "files", "--digests", tmp_path / "digests")
    run("diff", folder, tmp_path / "files")
    save_dcp(tmp_path / "other", {**tensors, "0.bias": tensors["0.bias"] + 1})
    assert "0.bias" in run("diff", folder, tmp_path / "other", code=1)


def test_copy_and_convert(folder, tensors, tmp_path):
    run("copy", folder, tmp_path / "copied")
    run("convert", folder, tmp_path / "converted", "--dtype", "BF16", "--shard-size", "1kB")
    run("convert", folder, tmp_path / "optimiser.safetensors", "--subfolder", "optim")
    with hw.open(tmp_path / "copied") as source:
        assert_same_bits(dict(source.tensors()), tensors)
    with hw.open(tmp_path / "converted") as source:
        assert_same_bits(dict(source.tensors()), {name: tensor.bfloat16() for name, tensor in tensors.items()})
    with hw.open(tmp_path / "optimiser.safetensors") as source:
        assert list(source.manifest) == ["state.x"]


def factory():
    return torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 20, bias=False))


def test_plan(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert "0.weight" in run("plan", folder, "--model", "test_commands:factory")


def test_a_sender_sends_it(folder, tensors, tmp_path):
    address = f"unix:{tmp_path / 'run' / 'socket'}"
    model = factory()
    with sender(address) as sending, receiver(address) as source, hw.open(folder) as saved:
        worker = Thread(lambda: hw.load(model, source))
        sending.send(saved, version="step-1")
        worker.result()
    assert_same_bits(dict(model.state_dict()), tensors)
