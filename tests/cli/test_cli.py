"""The command line: its commands, flags and exit codes are an interface."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from processes import Child
from typer.testing import CliRunner

from hotweights import LoadPlan
from hotweights.cli import app
from hotweights.testing import write_checkpoint

runner = CliRunner()


def run(*args):
    result = runner.invoke(app, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "ckpt", {"a.weight": torch.zeros(2, 3), "b": torch.tensor(1, dtype=torch.int64)})


def flags(command):
    text = re.sub(r"\x1b\[[0-9;]*m", "", run(command, "--help").output)
    return set(re.findall(r"--[a-z-]+", text))


def test_commands_and_flags():
    commands = {command.callback.__name__ for command in app.registered_commands}
    assert commands == {"inspect", "plan", "load", "send", "receive", "demo"}
    shared, allowing = {"--json", "--timeout", "--help"}, {"--allow-missing", "--allow-unexpected", "--cast"}
    assert flags("send") == shared | {"--to", "--receivers", "--version", "--on-lost", "--digests", "--no-digests"}
    assert flags("receive") == shared | {"--from", "--model", "--device", "--versions", "--offer-timeout"} | allowing
    assert flags("inspect") == {"--json", "--limit", "--reader", "--variant", "--subfolder", "--help"}
    assert flags("plan") == {
        *"--model --order --explain --save --limit --allow-missing --allow-unexpected --cast --json --help".split(),
        *("--variant", "--subfolder"),
    }
    assert flags("load") == {
        *"--model --reader --device --dtype --cast --io --threads --allow-missing --allow-unexpected".split(),
        "--variant",
        "--subfolder",
        *"--json --help".split(),
    }
    assert flags("demo") == {"--help"}
    assert "Exit codes: 0 done, 1 refused, 2 wrong usage, 130 interrupted" in run("--help").output


class TestInspect:
    def test_for_people(self, checkpoint):
        result = run("inspect", checkpoint)
        assert result.exit_code == 0
        assert "a.weight" in result.output
        assert "2 tensors (1 F32, 1 I64), 32 B in 1 files" in result.output

    def test_limit(self, checkpoint):
        assert "... and 1 more" in run("inspect", checkpoint, "--limit", 1).output
        assert "more" not in run("inspect", checkpoint, "--limit", 0).output

    def test_for_machines(self, checkpoint):
        document = json.loads(run("inspect", checkpoint, "--json").output)
        assert document["nbytes"] == 32
        assert [tensor["name"] for tensor in document["tensors"]] == ["a.weight", "b"]
        first = document["tensors"][0]
        assert (first["dtype"], first["shape"], first["nbytes"]) == ("F32", [2, 3], 24)
        with open(first["file"], "rb") as file:
            file.seek(first["offset"])
            assert file.read(24) == bytes(24)

    def test_a_broken_checkpoint_is_refused(self, checkpoint):
        file = checkpoint / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        result = run("inspect", checkpoint)
        assert result.exit_code == 1
        assert "CheckpointError" in result.stderr
        document = json.loads(run("inspect", checkpoint, "--json").output)
        assert document["error"]["kind"] == "CheckpointError"
        assert "model.safetensors" in document["error"]["message"]

    def test_files_that_are_absent(self, tmp_path):
        """What an interrupted copy leaves: files without their index."""
        place = write_checkpoint(tmp_path / "ckpt", {name: torch.zeros(2) for name in "abc"}, shards=3)
        (place / "model.safetensors.index.json").unlink()
        (place / "model-00002-of-00003.safetensors").unlink()
        result = run("inspect", place)
        assert result.exit_code == 1
        assert "1 of 3 files are absent, model-00002-of-00003.safetensors" in " ".join(result.stderr.split())

    def test_files_of_two_versions(self, tmp_path):
        place = write_checkpoint(tmp_path / "ckpt", {name: torch.zeros(2) for name in "ab"}, shards=2)
        os.utime(place / "model.safetensors.index.json", (1e9, 1e9))
        os.utime(place / "model-00001-of-00002.safetensors", (1e9, 1e9))
        told = "model-00002-of-00002.safetensors: newer than"
        assert f"warning: {told}" in run("inspect", place).output
        (warning,) = json.loads(run("inspect", place, "--json").output)["warnings"]
        assert warning.startswith(told)

    def test_wrong_usage(self):
        assert run("inspect").exit_code == 2
        assert run("inspect", "x", "--wrong").exit_code == 2


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    directory = tmp_path_factory.mktemp("bert")
    transformers.BertModel(config).save_pretrained(directory)
    return directory


class TestLoad:
    def test_for_people_and_for_machines(self, bert):
        result = run("load", bert, "--model", bert)
        assert result.exit_code == 0
        assert "BertModel" in result.output
        document = json.loads(run("load", bert, "--model", bert, "--json", "--io", "direct").output)
        assert document["bytes_read"] == document["bytes_written"] > 0
        assert document["tensors"]["missing"] == []

    def test_what_does_not_fit_is_refused(self, bert, checkpoint):
        result = run("load", checkpoint, "--model", bert, "--json")
        assert result.exit_code == 1
        unexpected = "a.weight: unexpected; the model has no such name (in model.safetensors)"
        assert unexpected in json.loads(result.output)["error"]["problems"]
        assert (
            run("load", checkpoint, "--model", bert, "--allow-missing", "*", "--allow-unexpected", "*").exit_code == 0
        )

    def test_lossy_casts(self, bert):
        assert run("load", bert, "--model", bert, "--dtype", "BF16").exit_code == 1
        assert run("load", bert, "--model", bert, "--dtype", "bfloat16", "--cast", "loader").exit_code == 0
        assert run("load", bert, "--model", bert, "--dtype", "bf17").exit_code == 2

    def test_no_config(self, bert, tmp_path):
        result = run("load", bert, "--model", tmp_path)
        assert result.exit_code == 1
        assert "config.json" in result.stderr


class TestPlan:
    def test_for_people_and_for_machines(self, bert):
        result = run("plan", bert, "--model", bert, "--order", "layer")
        assert result.exit_code == 0
        assert "embeddings.word_embeddings.weight" in result.output
        assert "copies" in result.output
        assert "... and " not in run("plan", bert, "--model", bert, "--limit", 0).output
        assert "more; --limit 0 lists all" in run("plan", bert, "--model", bert, "--limit", 1).output
        document = json.loads(run("plan", bert, "--model", bert, "--json").output)
        assert {"level": 0, "sources": ["pooler.dense.bias"], "destinations": ["pooler.dense.bias"]} in document[
            "steps"
        ]
        assert document["fates"]["pooler.dense.bias"] == "written"

    def test_explain(self, bert):
        result = run("plan", bert, "--model", bert, "--explain", "pooler.dense.bias")
        assert result.output == "pooler.dense.bias: F32 [16]\n  all of it <- pooler.dense.bias\n"
        document = json.loads(run("plan", bert, "--model", bert, "--explain", "pooler.dense.bias", "--json").output)
        assert document["name"] == "pooler.dense.bias"
        assert run("plan", bert, "--model", bert, "--explain", "pooler.tense.bias").exit_code == 2

    def test_save(self, bert, tmp_path):
        assert run("plan", bert, "--model", bert, "--save", tmp_path / "a.plan").exit_code == 0
        assert len(LoadPlan.load(tmp_path / "a.plan").steps) > 10

    def test_what_does_not_fit_is_refused(self, bert, checkpoint):
        result = run("plan", checkpoint, "--model", bert, "--json")
        assert result.exit_code == 1
        assert json.loads(result.output)["error"]["kind"] == "PlanError"
        assert run("plan", bert, "--model", bert, "--order", "sideways").exit_code == 2

    def test_lossy_casts(self, bert, tmp_path):
        config = json.loads((bert / "config.json").read_text()) | {"dtype": "bfloat16"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        refused = run("plan", bert, "--model", tmp_path)
        assert refused.exit_code == 1
        assert 'cast="loader" allows it' in refused.stderr
        for cast in ("floats", "loader"):  # as the error says
            assert run("plan", bert, "--model", tmp_path, "--cast", cast).exit_code == 0


class TestReader:
    def test_inspect(self, tmp_path):
        torch.save({"a.weight": torch.zeros(2, 3), "b": torch.tensor(1)}, tmp_path / "model.pt")
        result = run("inspect", tmp_path / "model.pt", "--reader", "torch")
        assert "2 tensors (1 F32, 1 I64), 32 B in 1 files" in result.output
        document = json.loads(run("inspect", tmp_path / "model.pt", "--reader", "torch", "--json").output)
        assert [set(tensor) for tensor in document["tensors"]] == [{"name", "dtype", "shape", "nbytes", "file"}] * 2

    def test_unknown(self, checkpoint):
        result = run("inspect", checkpoint, "--reader", "gguf")
        assert result.exit_code == 2
        assert "known are: fastsafetensors, hotweights, runai" in result.stderr


def receive(pipe, address, model):
    result = run("receive", "--from", address, "--model", model, "--offer-timeout", "60", "--json")
    pipe.send((result.exit_code, result.output))


class TestTransfer:
    def test_from_one_terminal_to_another(self, bert, tmp_path):
        """Two processes; whoever starts first waits for the other."""
        address = f"unix:{tmp_path / 'run' / 'socket'}"
        with Child(receive, address, bert) as child:
            sent = run("send", bert, "--to", address, "--version", "step-1", "--json")
            exit_code, output = child.heard()
        received = json.loads(output)
        assert (sent.exit_code, exit_code) == (0, 0)
        assert json.loads(sent.output)["committed"] == [child.name]
        assert received["version"] == "step-1"
        assert received["bytes_written"] > 0
        assert "pooler.dense.weight" in received["tensors"]["written"]
        assert "events" not in received

    def test_nobody_there(self, bert, tmp_path):
        address = f"unix:{tmp_path / 'run' / 'socket'}"
        refused = run("send", bert, "--to", address, "--timeout", "0.05")
        assert refused.exit_code == 1
        assert "0 of 1 receivers" in refused.stderr
        refused = run("receive", "--from", address, "--model", bert, "--offer-timeout", "0.05")
        assert refused.exit_code == 1
        assert "nobody listens there" in refused.stderr
        assert run("send", bert, "--to", "somewhere").exit_code == 2

    def test_on_a_terminal_it_says_what_it_waits_for(self, bert, tmp_path, monkeypatch):
        address = f"unix:{tmp_path / 'run' / 'socket'}"
        wait = ("receive", "--from", address, "--model", bert, "--offer-timeout", "0.05")
        assert "waiting" not in run(*wait).output
        monkeypatch.setattr(sys.modules["hotweights.cli.receive"], "_on_terminal", lambda: True)
        waited = run(*wait, "--json")
        assert f"waiting for version 1 of 1 from {address}, for 0.05 s at most" in waited.stderr
        assert json.loads(waited.stdout)["error"]["kind"] == "TransferTimeout"


def test_ctrl_c_is_130(monkeypatch, checkpoint):
    def interrupted(path, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["hotweights.cli.inspect"], "open_source", interrupted)
    assert run("inspect", checkpoint).exit_code == 130


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "hotweights", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "inspect" in done.stdout


@pytest.mark.long
@pytest.mark.timeout(330)  # Four more processes import torch and transformers.
def test_demo():
    """All of ``make demo``: it proves and refuses by itself, and fails if a proof fails."""
    done = subprocess.run(
        [sys.executable, "-m", "hotweights", "demo"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "equal those of transformers' own loading, bit for bit" in done.stdout
    assert done.stdout.count("model unharmed") == 3  # one for each refusal
    assert "StaleLease" in done.stdout
    assert done.stdout.count("equal to a cold load, bit for bit") == 2  # as it is, and in int8
    assert done.stdout.count("none of a mix") == 2
    assert not done.stderr
    assert "SIGKILL, with" in done.stdout
    workers = [line for line in done.stdout.splitlines() if "workers  both at" in line]
    assert [line.split("'")[1] for line in workers] == ["step-1", "step-2", "step-3", "step-3", "step-5"]
    assert workers[2].split("digest ")[1] == workers[3].split("digest ")[1].partition(" ")[0]
