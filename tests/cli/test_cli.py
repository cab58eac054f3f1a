"""The command line: its commands, flags and exit codes are an interface."""

import hashlib
import json
import os
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from processes import Child
from typer.testing import CliRunner

import hotweights
from hotweights import LoadPlan
from hotweights.cli import COMMANDS, app
from hotweights.sources import READERS
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
    text = re.sub(r"\x1b\[[0-9;]*m", "", run(command, "--help").output.replace("(--reader torch)", ""))
    text = re.sub(r"that --write made|or --files-from FILE", "", text)
    return set(re.findall(r"--[a-z][a-z-]+", text))


def test_commands_and_flags():
    assert set(COMMANDS) == {
        *"inspect verify diff copy convert follow plan load send receive relay keys resolve demo".split()
    }
    assert flags("--help") == {"--version", "--help"}
    shared, allowing = (
        {"--json", "--timeout", "--help"},
        {*"--allow-missing --allow-unexpected --allow-mismatched --cast".split()},
    )
    assert flags("send") == shared | {
        *"--to --receivers --version --on-lost --digests --no-digests".split(),
        *"--carrier --encrypt --keys --insecure --trace --deadline".split(),
    }
    assert flags("receive") == shared | allowing | {
        *"--from --model --device --versions --offer-timeout --keys --insecure --relay --keep".split()
    }
    assert flags("resolve") == {*"--keys --insecure --wait --commit --abort --json --help".split()}
    assert flags("relay") == {*"--from --to --keys --insecure --name --timeout --keep --help".split()}
    assert flags("keys") == {"--hosts", "--days", "--help"}
    assert flags("inspect") == {
        *"--json --limit --reader --variant --subfolder --deadline --quiet --files-from --help".split(),
    }
    assert flags("verify") == {
        *"--json --digests --write --files-from --quiet --reader --variant --subfolder --deadline --help".split(),
    }
    assert flags("diff") == {*"--json --variant --subfolder --deadline --help".split()}
    assert flags("copy") == {*"--json --shard-size --variant --subfolder --deadline --help".split()}
    assert flags("convert") == {
        *"--json --shard-size --dtype --overflow --reader --variant --subfolder --deadline --help".split(),
    }
    assert flags("follow") == {
        *"--versions --interval --timeout --latest --marker --pattern --deadline --json --help".split(),
    }
    assert flags("plan") == {
        *"--model --order --explain --save --limit --fleet --json --help".split(),
        *allowing,
        *("--variant", "--subfolder", "--deadline"),
    }
    assert flags("load") == {
        *"--model --reader --device --dtype --io --threads".split(),
        *allowing,
        *"--variant --subfolder --deadline --json --help".split(),
    }
    assert flags("demo") == {"--help"}
    assert "Exit codes: 0 done, 1 refused, 2 wrong usage, 3 the output" in run("--help").output


class TestInspect:
    def test_for_people(self, checkpoint):
        result = run("inspect", checkpoint)
        assert result.exit_code == 0
        assert "a.weight" in result.output
        assert "2 tensors (1 F32, 1 I64), 32 B in 1 file" in result.output

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
        result = run("inspect")
        assert result.exit_code == 2
        assert "name a path: hotweights inspect PATH, or --files-from FILE" in result.stderr
        assert run("inspect", "x", "--wrong").exit_code == 2


class TestInspectSeveral:
    @pytest.fixture
    def broken(self, tmp_path):
        (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html>404</html>")
        return tmp_path / "page.safetensors"

    def test_a_line_for_each_and_the_worst_exit_code(self, checkpoint, broken):
        result = run("inspect", checkpoint, broken, checkpoint)
        good = f"{checkpoint}: 2 tensors (1 F32, 1 I64), 32 B in 1 file"
        lines = result.output.splitlines()
        assert result.exit_code == 1
        assert (lines[0], lines[2], len(lines)) == (good, good, 3)
        assert lines[1].startswith(f"{broken}: CheckpointError: ")
        assert "this is a web page" in lines[1]
        assert run("inspect", checkpoint, checkpoint).exit_code == 0

    def test_quiet(self, checkpoint, broken):
        assert run("inspect", "--quiet", checkpoint, checkpoint).output == ""
        assert run("inspect", "--quiet", checkpoint).output == ""
        assert len(run("inspect", "--quiet", checkpoint, broken).output.splitlines()) == 1

    def test_for_machines(self, checkpoint, broken):
        first, second = map(json.loads, run("inspect", checkpoint, broken, "--json").output.splitlines())
        assert (first["path"], first["nbytes"], first["dtypes"]) == (str(checkpoint), 32, {"F32": 1, "I64": 1})
        assert (second["path"], second["error"]["kind"]) == (str(broken), "CheckpointError")

    def test_files_from(self, checkpoint, broken, tmp_path):
        (tmp_path / "list").write_text(f"{checkpoint}\n\n{broken}\n")
        result = run("inspect", "--files-from", tmp_path / "list")
        assert (result.exit_code, len(result.output.splitlines())) == (1, 2)
        piped = runner.invoke(app, ["inspect", "--files-from", "-"], input=f"{checkpoint}\n")
        assert piped.output == f"{checkpoint}: 2 tensors (1 F32, 1 I64), 32 B in 1 file\n"
        assert runner.invoke(app, ["inspect", "--files-from", "-"], input="").exit_code == 0
        assert "cannot be read" in run("inspect", "--files-from", tmp_path / "none").stderr


def test_off_a_terminal_nothing_is_cut_or_wrapped(tmp_path):
    name = ".".join(["a_very_long_name_of_a_layer"] * 12)
    place = write_checkpoint(tmp_path / "ckpt", {name: torch.zeros(2)})
    assert any(
        line.startswith(name) and line.endswith("model.safetensors")
        for line in run("inspect", place).output.splitlines()
    )
    (place / "model.safetensors").write_bytes(b"")
    (line,) = run("inspect", place).stderr.splitlines()
    assert str(place) in line


def test_inspect_does_not_wait_for_torch(checkpoint):
    code = f"import sys; from hotweights.cli import app; sys.argv[1:] = ['inspect', {str(checkpoint)!r}]\ntry: app()\n"
    code += "except SystemExit as end: assert not end.code; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 tensors" in done.stdout


def test_what_is_misspelt_is_told_with_what_was_meant(checkpoint, tmp_path):
    told = run("inpect", checkpoint)
    assert (told.exit_code, "did you mean inspect?" in told.stderr) == (2, True)
    told = run("copy", checkpoint, tmp_path / "to", "--dtype", "BF16")
    assert (told.exit_code, "--dtype; hotweights convert has it" in told.stderr) == (2, True)
    assert run("convert", checkpoint, tmp_path / "to", "--dtype", "BF16").exit_code == 0
    assert "hotweights" not in run("copy", checkpoint, tmp_path / "more", "--nothing").stderr.partition("Error")[2]


def test_dtypes_that_are_offered_are_taken(checkpoint, tmp_path):
    told = run("convert", checkpoint, tmp_path / "to", "--dtype", "list")
    assert told.exit_code == 2
    known = told.stderr.strip().partition("known are: ")[2].split(", ")
    assert {"BF16", "F16", "F32"} <= {*known}
    for name in known:
        assert run("convert", checkpoint, tmp_path / name, "--dtype", name).exit_code == 0


def test_version():
    assert run("--version").output == f"{hotweights.__version__}\n"


def test_the_readers_in_the_help_are_those_that_there_are():
    for reader in READERS:
        assert reader in run("inspect", "--help").output


class TestVerify:
    def test_digests_of_ours(self, checkpoint, tmp_path):
        written = run("verify", checkpoint, "--write", tmp_path / "digests")
        assert run("verify", checkpoint, "--digests", tmp_path / "digests").output == written.output
        write_checkpoint(checkpoint, {"a.weight": torch.ones(2, 3), "c": torch.tensor(1)})
        result = run("verify", checkpoint, "--digests", tmp_path / "digests", "--json")
        problems = json.loads(result.output)["error"]["problems"]
        assert result.exit_code == 1
        assert [problem.partition(":")[0] for problem in problems] == ["tensor 'b'", "tensor 'c'"]  # Nothing was read.

    def test_sha256(self, checkpoint, tmp_path):
        file = checkpoint / "model.safetensors"
        (tmp_path / "sums").write_text(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  model.safetensors\n")
        assert run("verify", checkpoint, "--digests", tmp_path / "sums").exit_code == 0
        file.write_bytes(file.read_bytes()[:-1] + b"\7")
        result = run("verify", checkpoint, "--digests", tmp_path / "sums")
        assert result.exit_code == 1
        assert "model.safetensors: sha256" in result.stderr
        (tmp_path / "sums").write_text(f"{'0' * 64}  other.safetensors\n")
        assert "model.safetensors: not in the list" in run("verify", checkpoint, "--digests", tmp_path / "sums").stderr

    def test_a_variant_in_a_folder(self, tmp_path):
        write_checkpoint(tmp_path / "unet", {"a": torch.ones(2)})
        hotweights.save({"a": torch.zeros(2)}, tmp_path / "unet" / "model.fp16.safetensors")
        chosen = ("--subfolder", "unet", "--variant", "fp16")
        written = run("verify", tmp_path, *chosen, "--write", tmp_path / "digests")
        assert written.exit_code == 0
        assert written.output != run("verify", tmp_path, "--subfolder", "unet").output
        assert run("verify", tmp_path, *chosen, "--digests", tmp_path / "digests").exit_code == 0
        assert run("verify", tmp_path / "unet", "--digests", tmp_path / "digests").exit_code == 1

    @pytest.mark.parametrize("text", ["", "nonsense", "{", "{}", '{"tensors": 3}'])
    def test_no_digests(self, text, checkpoint, tmp_path):
        (tmp_path / "sums").write_text(text)
        result = run("verify", checkpoint, "--digests", tmp_path / "sums")
        assert result.exit_code == 1
        assert "hotweights verify --write" in result.stderr

    def test_it_is_that_of_the_model(self, tmp_path):
        model = torch.nn.Linear(2, 2)
        hotweights.save(model, tmp_path / "m")
        whole = hotweights.LiveModel(torch.nn.Linear(2, 2))
        whole.load(tmp_path / "m")
        assert run("verify", tmp_path / "m").output == f"{whole.digest()}  {tmp_path / 'm'}\n"


class TestDiff:
    def test_a_variant_in_a_folder(self, tmp_path):
        for name, value in (("a", 1.0), ("b", 2.0)):
            write_checkpoint(tmp_path / name / "unet", {"t": torch.tensor(0.0)})
            hotweights.save({"t": torch.tensor(value)}, tmp_path / name / "unet" / "model.fp16.safetensors")
        chosen = ("--subfolder", "unet", "--variant", "fp16")
        assert run("diff", tmp_path / "a", tmp_path / "b", "--subfolder", "unet").exit_code == 0
        assert run("diff", tmp_path / "a", tmp_path / "b", *chosen).exit_code == 1
        copy = tmp_path / "b" / "unet" / "model.fp16.safetensors"  # A file has nothing to choose from.
        assert run("diff", tmp_path / "b", copy, *chosen).output == "equal: 1 tensor\n"
        assert run("diff", copy, copy, *chosen).exit_code == 2

    def test_what_differs(self, tmp_path):
        same, nan = torch.arange(4.0), torch.tensor([1.0, torch.nan])
        left = {
            "same": same,
            "v": torch.tensor([1.0, 2.0, 3.0]),
            "n": nan,
            "t": torch.ones(2),
            "l": same,
            "i": torch.tensor([1]),
        }
        right = {
            "same": same,
            "v": torch.tensor([1.0, 2.5, 2.0]),
            "n": nan.flip(0),
            "t": torch.ones(2).half(),
            "r": same,
            "i": torch.tensor([4]),
        }
        a, b = write_checkpoint(tmp_path / "a", left, shards=2), write_checkpoint(tmp_path / "b", right)
        assert run("diff", a, a).output == "equal: 6 tensors\n"
        result = run("diff", a, b, "--json")
        assert result.exit_code == 1
        found = {each["name"]: each for each in json.loads(result.output)["differences"]}
        assert found.keys() == {"v", "n", "t", "l", "r", "i"}
        assert (found["v"]["elements"], found["v"]["of"], found["v"]["largest"]) == (2, 3, 1.0)
        assert (found["n"]["elements"], found["n"]["largest"]) == (2, None)
        assert found["i"]["largest"] == 3.0
        assert found["t"]["detail"] == "F32 [2] and F16 [2]"
        assert (found["l"]["what"], found["r"]["what"]) == ("only in the first", "only in the second")
        assert re.search(r"v +values +2 of 3 +1\n", run("diff", a, b).output)


class TestCopy:
    def test_copy(self, tmp_path):
        place = write_checkpoint(tmp_path / "a", {"a": torch.randn(8), "b": torch.randn(8)}, shards=2)
        (place / "config.json").write_text("{}")
        (place / "optimizer.pt").write_text("large")
        assert run("copy", place, tmp_path / "b").exit_code == 0
        assert run("diff", place, tmp_path / "b").exit_code == 0
        assert sorted(os.listdir(tmp_path / "b")) == ["config.json", "model.safetensors"]
        assert run("copy", place, place).exit_code == 2
        (place / "config.json").write_text("[]")
        assert run("copy", place, tmp_path / "b", "--shard-size", "32").exit_code == 0
        assert (tmp_path / "b" / "config.json").read_text() == "[]"
        assert len(os.listdir(tmp_path / "b")) == 4

    def test_nothing_is_copied_without_the_configuration(self, tmp_path, monkeypatch):
        place = write_checkpoint(tmp_path / "a", {"a": torch.randn(8)})
        (place / "config.json").write_text("{}")
        copyfile = lambda source, to: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # noqa: E731
        monkeypatch.setattr("hotweights.sources.files.staging.shutil.copyfile", copyfile)
        result = run("copy", place, tmp_path / "b")
        assert result.exit_code == 1
        assert "config.json: cannot be copied, and nothing was saved: No space left" in result.stderr
        assert os.listdir(tmp_path) == ["a"]

    def test_of_several_variants_one_is_copied(self, tmp_path):
        both = tmp_path / "both"
        both.mkdir()
        for variant, value in (("fp16", 1.0), ("bf16", 2.0)):
            hotweights.save({"a": torch.tensor([value])}, both / f"model.{variant}.safetensors")
        for command in ("copy", "convert"):
            refused = run(command, both, tmp_path / command)
            assert refused.exit_code == 1
            assert "--variant fp16" in refused.stderr
            assert run(command, both, tmp_path / command, "--variant", "fp16").exit_code == 0
            assert run(command, tmp_path, tmp_path / f"{command}2", "--subfolder", command).exit_code == 0
            with hotweights.open(tmp_path / f"{command}2") as source:
                assert dict(source.tensors())["a"].tolist() == [1.0]

    def test_convert(self, tmp_path):
        torch.save({"w": torch.randn(8), "n": torch.tensor([1])}, tmp_path / "model.bin")
        result = run(
            "convert",
            tmp_path / "model.bin",
            tmp_path / "c",
            "--reader",
            "torch",
            "--dtype",
            "BF16",
            "--shard-size",
            "16B",
            "--json",
        )
        assert result.exit_code == 0
        assert json.loads(result.output)["nbytes"] == 24
        assert "1 BF16, 1 I64" in run("inspect", tmp_path / "c").output
        assert run("convert", tmp_path / "c", tmp_path / "d", "--dtype", "BF17").exit_code == 2

    def test_a_disk_that_lies(self, tmp_path, monkeypatch):
        place = write_checkpoint(tmp_path / "a", {"a": torch.randn(8)})
        write = os.pwrite
        lies = lambda fd, raw, at: write(fd, bytes(raw)[:-1] + b"\0" if at else raw, at)  # noqa: E731  # Not in the header.
        monkeypatch.setattr(os, "pwrite", lies)
        result = run("copy", place, tmp_path / "b.safetensors")
        assert result.exit_code == 1
        assert "reads back otherwise" in result.stderr


class TestFollow:
    @pytest.fixture
    def steps(self, tmp_path):
        for number in (1, 2):
            place = write_checkpoint(tmp_path / f"step-{number}", {"a": torch.zeros(2)})
            os.utime(place / "model.safetensors", (number, number))
        return tmp_path

    def test_a_line_for_each(self, steps):
        result = run("follow", steps, "--interval", "0.001", "--versions", 2)
        assert result.exit_code == 0
        assert result.output == f"step-1\t{steps / 'step-1'}\nstep-2\t{steps / 'step-2'}\n"
        result = run("follow", steps, "--interval", "0.001", "--versions", 1, "--latest", "--json")
        assert json.loads(result.output) == {"name": "step-2", "path": str(steps / "step-2")}

    def test_fewer_than_wanted(self, steps):
        result = run("follow", steps, "--interval", "0.001", "--timeout", "0.01", "--marker", "DONE", "--versions", 1)
        assert result.exit_code == 1
        assert "0 of 1 versions came; the next did not within 0.01 s" in result.stderr
        assert "passed over step-1: waits for DONE" in result.stderr
        result = run("follow", steps, "--timeout", "0.001", "--pattern", "run-*")
        assert (result.exit_code, result.stdout) == (0, "")
        assert "no version came within 0.001 s; versions are folders like run-*" in result.stderr

    def test_what_was_passed_over_for_machines(self, steps):
        line = ("follow", steps, "--interval", "0.001", "--timeout", "0.01", "--json")
        result = run(*line, "--marker", "DONE")
        why = "waits for DONE, the marker that its writer writes last"
        assert json.loads(result.stdout) == {"path": str(steps), "passed_over": {"step-1": why, "step-2": why}}
        all_of_them = run("follow", steps, "--interval", "0.001", "--versions", "2", "--json")
        assert len(all_of_them.stdout.splitlines()) == 2

    def test_an_interval_longer_than_the_timeout_is_told(self, steps):
        told = run("follow", steps, "--interval", "5", "--timeout", "0.01", "--versions", "1")
        assert "nothing has changed for --interval 5 s: longer than --timeout" in told.stderr

    def test_no_directory(self, tmp_path):
        assert run("follow", tmp_path / "runs").exit_code == 2


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

    def test_a_factory(self, tmp_path):
        hotweights.save({"weight": torch.ones(3), "bias": torch.ones(3)}, tmp_path / "m.safetensors")
        (tmp_path / "made_here.py").write_text("import torch\ndef norm():\n    return torch.nn.LayerNorm(3)\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            assert run("load", "m.safetensors", "--model", "made_here:norm").exit_code == 0
            told = run("load", "m.safetensors", "--model", "made_here:norm", "--dtype", "BF16")
            assert (told.exit_code, "leave it out" in told.stderr) == (2, True)
            for command in ("plan", "load"):
                for wrong in ("torch.nn", "made_here.py:norm", "made_here.py", "made_here"):
                    told = run(command, "m.safetensors", "--model", wrong)
                    if not os.path.exists(wrong):
                        assert (told.exit_code, "write package.module:factory" in told.stderr) == (2, True)

    def test_a_factory_with_a_buffer_that_no_checkpoint_carries(self, tmp_path):
        hotweights.save({"weight": torch.ones(3), "bias": torch.ones(3)}, tmp_path / "m.safetensors")
        (tmp_path / "made_with_buffer.py").write_text(
            "import torch\n"
            "class Norm(torch.nn.LayerNorm):\n"
            "    def __init__(self):\n"
            "        super().__init__(3)\n"
            "        self.register_buffer('angles', torch.arange(3), persistent=False)\n"
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            told = run("load", "m.safetensors", "--model", "made_with_buffer:Norm")
            assert told.exit_code == 0, told.stderr

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
        assert "--cast floats allows it" in refused.stderr
        for cast in ("floats", "loader"):  # as the error says
            assert run("plan", bert, "--model", tmp_path, "--cast", cast).exit_code == 0


class TestPlanOfAFactory:
    @pytest.fixture(autouse=True)
    def ours(self, tmp_path, monkeypatch):
        name = f"models_of_{tmp_path.name}"  # Python keeps what it has imported.
        (tmp_path / f"{name}.py").write_text(
            "import torch\n"
            "class Zoo:\n"
            "    @staticmethod\n"
            "    def linear(): return torch.nn.Linear(2, 3)\n"
            "def table(): return {}\n"
            "def picky(size): ...\n"
        )
        (tmp_path / "unimportable.py").write_text("import nothing_of_that_name\n")
        monkeypatch.chdir(tmp_path)
        return name

    def test_it_is_called(self, ours, tmp_path):
        place = write_checkpoint(tmp_path / "c", {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)})
        path = sys.path.copy()
        result = run("plan", place, "--model", f"{ours}:Zoo.linear", "--json")
        assert json.loads(result.output)["fates"] == {"weight": "written", "bias": "written"}
        assert sys.path == path
        assert run("plan", place, "--model", "torch.nn:Identity").exit_code == 1

    @pytest.mark.parametrize(
        ("factory", "words"),
        [
            ("{ours}:tables", r"there is no 'tables' in it; similar: table"),
            ("{ours}:table", r"gives a torch.nn.Module; this gave a dict"),
            ("{ours}:picky", r"calling it on meta without arguments failed: TypeError: .*'size'"),
            ("of.nobody:make", r"there is no module of here. Start this where `python -c 'import of.nobody'` works"),
            ("unimportable:make", r"importing it failed: No module named 'nothing_of_that_name'"),
        ],
    )
    def test_what_is_wrong_with_it(self, factory, words, ours, checkpoint):
        result = run("plan", checkpoint, "--model", factory.format(ours=ours))
        assert result.exit_code == 2
        assert re.search(words, result.stderr), result.stderr


class TestReader:
    def test_inspect(self, tmp_path):
        torch.save({"a.weight": torch.zeros(2, 3), "b": torch.tensor(1)}, tmp_path / "model.pt")
        result = run("inspect", tmp_path / "model.pt", "--reader", "torch")
        assert "2 tensors (1 F32, 1 I64), 32 B in 1 file" in result.output
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

    def test_a_free_port_is_told(self, bert):
        refused = run("send", bert, "--to", "tcps://127.0.0.1:0", "--timeout", "0.05")
        assert re.search(r"^listening at (tcps://127\.0\.0\.1:[1-9]\d*)$", refused.stderr, re.MULTILINE)

    def test_on_a_terminal_it_says_what_it_waits_for(self, bert, tmp_path, monkeypatch):
        address = f"unix:{tmp_path / 'run' / 'socket'}"
        wait = ("receive", "--from", address, "--model", bert, "--offer-timeout", "0.05")
        assert "waiting" not in run(*wait).output
        monkeypatch.setattr(import_module("hotweights.cli.receive"), "_on_terminal", lambda: True)
        waited = run(*wait, "--json")
        assert f"waiting for version 1 of 1 from {address}, for 0.05 s at most" in waited.stderr
        assert json.loads(waited.stdout)["error"]["kind"] == "TransferTimeout"


def test_ctrl_c_is_130(monkeypatch, checkpoint):
    def interrupted(path, **which):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("hotweights.cli.inspect"), "list_checkpoint", interrupted)
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
    waiting = "waiting for a sender at"  # It is logged where a busy machine is slow to start one.
    assert not [line for line in done.stderr.splitlines() if not line.startswith(waiting)]
    assert "SIGKILL, with" in done.stdout
    workers = [line for line in done.stdout.splitlines() if "workers  both at" in line]
    assert [line.split("'")[1] for line in workers] == ["step-1", "step-2", "step-3", "step-3", "step-5"]
    assert workers[2].split("digest ")[1] == workers[3].split("digest ")[1].partition(" ")[0]
