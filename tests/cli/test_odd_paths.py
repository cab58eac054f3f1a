"""Every command over what people name by mistake, and what broken downloads leave: a line, a code, no traceback."""

import json
import os
import re
import shlex
import tarfile

import pytest
import torch
from typer.testing import CliRunner

from hotweights.cli import app
from hotweights.cli.outcome import typed
from hotweights.testing import write_checkpoint

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
# What lies there, and what the error says.
ODD = {
    "nothing": "there is no such file or directory",
    "dangling": "a link that leads nowhere",
    "loop": "a link that leads in a circle",
    "empty": "it is empty",
    "only.bin": "opens .bin files",
    "dangling.d": "model.safetensors: cannot be opened: a link that leads nowhere",
    "stale.d": "model-00002-of-00002.safetensors: named by the index",
    "moved.d": "which does not hold it",
    "page.d": "a web page",
    "a.gguf": "GGUF file",
    "page.safetensors": "a web page",
    "pointer.safetensors": "git lfs pull",
    "zip.safetensors": "zip archive",
    "empty.safetensors": "the file is empty",
    "short.safetensors": "is it truncated?",
    "long.safetensors": "trailing bytes",
    "zeros.safetensors": "begins with zero bytes",
    "gzip.safetensors": "a gzip archive",
    "a.tar": "tar xf",
    "pointer.index.json": "git lfs pull",
    "empty.index.json": "the file is empty",
    "text.txt": "this is text",
    "pipe.safetensors": "a pipe, a socket or a device",
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    place = tmp_path_factory.mktemp("zoo")
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    good = (write_checkpoint(place / "good", tensors) / "model.safetensors").read_bytes()
    (place / "dangling").symlink_to("nowhere")
    (place / "loop").symlink_to("loop")
    for folder in ("empty", "only.bin", "dangling.d"):
        (place / folder).mkdir()
    torch.save(tensors, place / "only.bin" / "pytorch_model.bin")
    (place / "dangling.d" / "model.safetensors").symlink_to("../blobs/1")
    (write_checkpoint(place / "stale.d", tensors, shards=2) / "model-00002-of-00002.safetensors").unlink()
    moved = write_checkpoint(place / "moved.d", tensors, shards=2)
    for name in ("moved.d", "page.d"):
        index = write_checkpoint(place / name, tensors, shards=2) / "model.safetensors.index.json"
        shard = "model-00001-of-00002.safetensors"
        index.write_text("<html>" if name == "page.d" else json.dumps({"weight_map": {"a": shard, "b": shard}}))
    (moved / "model-00002-of-00002.safetensors").unlink()
    for name, content in {
        "a.gguf": b"GGUF\3\0\0\0" + bytes(100),
        "page.safetensors": b"<!DOCTYPE html><html>404</html>",
        "pointer.safetensors": POINTER.encode(),
        "zip.safetensors": b"PK\3\4" + bytes(100),
        "empty.safetensors": b"",
        "short.safetensors": good[:-5],
        "long.safetensors": good + b"more",
        "zeros.safetensors": bytes(100),
        "gzip.safetensors": b"\x1f\x8b\x08" + b"x" * 100,
        "pointer.index.json": POINTER.encode(),
        "empty.index.json": b"",
        "text.txt": b"hello",
    }.items():
        (place / name).write_bytes(content)
    with tarfile.open(place / "a.tar", "w") as archive:
        archive.add(place / "text.txt")
    os.mkfifo(place / "pipe.safetensors")
    return place


def lines(path, zoo, tmp_path):
    """Each command that reads a checkpoint, and its exit code."""
    return [
        (["inspect", path], 1),
        (["verify", path], 1),
        (["diff", zoo / "good", path], 2),
        (["diff", path, zoo / "good"], 2),
        (["copy", path, tmp_path / "to"], 1),
        (["convert", path, tmp_path / "to", "--dtype", "F16"], 1),
        (["plan", path, "--model", "torch.nn:Identity"], 1),
        (["load", path, "--model", zoo / "good"], 1),
        (["send", path, "--to", f"unix:{tmp_path / 'socket'}", "--timeout", "0.01"], 1),
    ]


def run(line):
    result = CliRunner().invoke(app, [str(word) for word in line])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize("name", ODD)
def test_one_path(name, zoo, tmp_path):
    for line, code in lines(zoo / name, zoo, tmp_path):
        told = run(line)
        assert (told.exit_code, told.stdout) == (code, ""), line
        assert told.stderr.startswith("CheckpointError: "), line
        assert told.stderr.count("\n") == 1, told.stderr
        assert ODD[name] in told.stderr
        document = run([*line, "--json"])
        assert (document.exit_code, document.stderr) == (code, "")
        assert ODD[name] in json.loads(document.stdout)["error"]["message"]
    assert os.listdir(tmp_path) in ([], ["socket"])


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_many_paths(command, zoo):
    names = ["good", *ODD]
    told = run([command, *(zoo / name for name in names)])
    assert (told.exit_code, told.stderr) == (1, "")
    for name, line in zip(names, told.stdout.splitlines(), strict=True):
        assert str(zoo / name) in line
        assert ODD.get(name, "") in line
    documents = run([command, "--json", *(zoo / name for name in names)]).stdout.splitlines()
    assert ["error" in json.loads(line) for line in documents] == [False] + [True] * len(ODD)
    quiet = run([command, "--quiet", *(zoo / name for name in names)])
    assert quiet.stdout.splitlines() == told.stdout.splitlines()[1:]


def test_weights_of_two_formats_beside_each_other(zoo, tmp_path):
    place = write_checkpoint(tmp_path / "both", {"a": torch.zeros(2, 3), "b": torch.ones(4)})
    torch.save({"other": torch.zeros(1)}, place / "pytorch_model.bin")
    for line in (["inspect", place], ["verify", place], ["diff", place, zoo / "good"]):
        assert run(line).exit_code == 0
    copied = run(["copy", place, tmp_path / "to"])
    assert "left  pytorch_model.bin: weights of another format, or of a trainer" in copied.stdout
    assert os.listdir(tmp_path / "to") == ["model.safetensors"]


def test_the_advice_for_bin_files_can_be_typed(zoo, tmp_path):
    told = run(["verify", zoo / "only.bin"]).stderr
    assert "; --reader torch opens .bin files" in told
    for command in ("inspect", "verify"):
        assert run([command, zoo / "only.bin", "--reader", "torch"]).exit_code == 0
    assert run(["convert", zoo / "only.bin", tmp_path / "to", "--reader", "torch"]).exit_code == 0
    told = run(["diff", zoo / "only.bin", zoo / "good"]).stderr  # A command that has no --reader.
    (line,) = re.findall(r"`hotweights (convert .* NEW --reader torch)` \(then give NEW here\)", told)
    assert run([*shlex.split(line.replace("NEW", str(tmp_path / "new")))]).exit_code == 0
    assert run(["diff", zoo / "only.bin", zoo / "good"]).exit_code == 2
    assert run(["diff", tmp_path / "new", tmp_path / "to"]).exit_code == 0


def test_digests_of_a_torch_file_are_compared_by_the_command_that_wrote_them(zoo, tmp_path):
    line = ["verify", zoo / "only.bin", "--reader", "torch"]
    assert run([*line, "--write", tmp_path / "list.json"]).exit_code == 0
    assert run([*line, "--digests", tmp_path / "list.json"]).exit_code == 0


def test_safetensors_under_the_reader_of_torch(zoo):
    told = run(["inspect", zoo / "good", "--reader", "torch"]).stderr
    assert "it holds model.safetensors: leave --reader torch out" in told


def test_the_advice_for_a_torch_file_by_another_name_can_be_followed(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "m.safetensors")
    assert "rename it to .bin: --reader torch opens" in run(["inspect", tmp_path / "m.safetensors"]).stderr
    (tmp_path / "m.safetensors").rename(tmp_path / "m.bin")
    assert run(["inspect", tmp_path / "m.bin", "--reader", "torch"]).exit_code == 0


def test_links_that_lead_nowhere_as_shards(tmp_path):
    place = write_checkpoint(tmp_path, {"a": torch.zeros(2), "b": torch.ones(4)}, shards=2)
    shard = place / "model-00002-of-00002.safetensors"
    for target, where in (("nowhere", "nowhere"), (shard.name, "in a circle")):
        shard.unlink()
        shard.symlink_to(target)
        assert f"but it is a link that leads {where}" in run(["inspect", place]).stderr
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    assert "a link that leads in a circle" in run(["inspect", tmp_path / "loop.safetensors"]).stderr


def test_a_list_that_cannot_be_read_or_is_empty(tmp_path):
    told = run(["inspect", "--json", "--files-from", tmp_path / "none"])
    assert (told.exit_code, told.stdout.count("\n")) == (2, 1)
    assert json.loads(told.stdout)["path"] == str(tmp_path / "none")
    (tmp_path / "list").write_text("")
    assert f"no paths in {tmp_path / 'list'}" in run(["verify", "--files-from", tmp_path / "list"]).stderr


class TestVerifyOfMany:
    def test_a_line_for_each(self, zoo, tmp_path):
        one = run(["verify", zoo / "good"]).stdout
        assert run(["verify", zoo / "good", zoo / "good"]).stdout == one * 2
        (tmp_path / "list").write_text(f"{zoo / 'good'}\n")
        assert run(["verify", "--files-from", tmp_path / "list"]).stdout == one
        (tmp_path / "list").write_text("")
        assert (run(["verify", "--files-from", tmp_path / "list"]).exit_code, run(["verify"]).exit_code) == (0, 2)

    def test_one_list_of_digests_for_all(self, zoo, tmp_path):
        other = write_checkpoint(tmp_path / "other", {"a": torch.zeros(2, 3), "b": torch.zeros(4)})
        run(["verify", zoo / "good", "--write", tmp_path / "digests"])
        told = run(["verify", zoo / "good", other, "--digests", tmp_path / "digests"])
        first, second = told.stdout.splitlines()
        assert (told.exit_code, first.endswith("good")) == (1, True)
        assert second.startswith(f"{other}: CheckpointError: ")
        assert "tensor 'b'" in second

    def test_what_is_written_is_of_one(self, zoo, tmp_path):
        told = run(["verify", zoo / "good", zoo / "good", "--write", tmp_path / "digests"])
        assert (told.exit_code, os.listdir(tmp_path)) == (2, [])
        assert "--write is for one path, and there are 2" in told.stderr


class TestWhatCannotBe:
    @pytest.mark.parametrize("command", ["inspect", "verify", "plan --model m", "load --model m", "send --to unix:a"])
    def test_an_empty_path(self, command, zoo, tmp_path, monkeypatch):
        """A variable of the shell that is not set is not the directory where one is."""
        monkeypatch.chdir(zoo / "good")
        told = run([*command.split(), ""])
        assert (told.exit_code, told.stdout) == (2, "")
        assert "the path is empty" in told.stderr

    @pytest.mark.parametrize(
        "line", [["copy", "good", ""], ["copy", "", "to"], ["convert", "good", ""], ["diff", "", ""]]
    )
    def test_an_empty_path_of_two(self, line, zoo, monkeypatch):
        monkeypatch.chdir(zoo)
        before = sorted(os.listdir())
        assert run(line).exit_code == 2
        assert sorted(os.listdir()) == before

    def test_files_that_cannot_be_written(self, zoo, tmp_path):
        (tmp_path / "file").write_text("")
        for line in (
            ["verify", zoo / "good", "--write", tmp_path / "none" / "digests"],
            ["plan", zoo / "good", "--model", "torch.nn:Identity", "--allow-unexpected", "*"],
            ["copy", zoo / "good", tmp_path / "file" / "to"],
        ):
            told = run([*line, "--save", tmp_path / "none" / "plan"] if line[0] == "plan" else line)
            assert (told.exit_code, told.stdout) == (1, "")
            assert told.stderr.count("\n") == 1, told.stderr
        told = run(["keys", tmp_path / "file", "--hosts", "a"])
        assert told.exit_code == 2
        assert f"{tmp_path / 'file'}: cannot be written: " in told.stderr


class TestNothingIsLost:
    """No output replaces a file that is read, or that the option has not written."""

    @pytest.mark.parametrize(
        "line",
        [
            "verify sharded --write sharded/model-00001-of-00002.safetensors",
            "verify sharded --write sharded/model.safetensors.index.json",
            "verify sharded --write other.json",
            "plan sharded --model torch.nn:Identity --save sharded/model-00001-of-00002.safetensors",
            "plan sharded --model torch.nn:Identity --allow-unexpected * --save other.json",
            "send sharded --to unix:socket --timeout 0.01 --trace sharded/model-00001-of-00002.safetensors",
            "copy sharded sharded/model-00001-of-00002.safetensors",
            "copy sharded/model-00001-of-00002.safetensors sharded",
            "convert sharded sharded/../link --dtype F16",
            "convert sharded new.bin --dtype F16",
        ],
    )
    def test_it_is_refused(self, line, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write_checkpoint(tmp_path / "sharded", {"a": torch.zeros(2, 3), "b": torch.ones(4)}, shards=2)
        (tmp_path / "link").symlink_to("sharded")
        (tmp_path / "other.json").write_text('{"a": 1}')
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        told = run(line.split())
        assert (told.exit_code, told.stdout) == (2, "")
        assert "name a" in told.stderr
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    def test_what_the_option_has_written_is_replaced(self, zoo, tmp_path):
        for _ in range(2):
            assert run(["verify", zoo / "good", "--write", tmp_path / "digests"]).exit_code == 0
            plan = ["plan", zoo / "good", "--model", "torch.nn:Identity", "--allow-unexpected", "*"]
            assert run([*plan, "--save", tmp_path / "plan"]).exit_code == 0


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ('choose one: variant="fp16" or variant="b c"', "choose one: --variant fp16 or --variant 'b c'"),
        ('allow_mismatched="head.*" keeps', "--allow-mismatched 'head.*' keeps"),
        ("interval= is a number of seconds", "--interval is a number of seconds"),
        ("with shard_size= name a directory", "with --shard-size name a directory"),
        ("give keys=DIR to both ends", "give --keys DIR to both ends"),
        ("insecure=True goes without", "--insecure goes without"),
        ("device='cuda' is no device", "--device cuda is no device"),
        ("hotweights.open(path, digests=...)", "hotweights.open(path, digests=...)"),
        ("deadline= is more than 0 s", "--deadline is more than 0 s"),
    ],
)
def test_options_are_as_they_are_typed(said, shown):
    assert typed(said) == shown


@pytest.mark.parametrize("scheme", ["s3", "hf", "gs", "https"])
def test_an_address_that_ends_after_its_scheme(scheme):
    for command in (["inspect"], ["verify"], ["follow", "--timeout", "0.01"]):
        told = run([*command, f"{scheme}://"])
        assert told.exit_code == 2
        assert f"{scheme}://: the address ends after its scheme; is a variable not set? Give {scheme}://" in told.stderr


def test_a_pattern_that_matches_nothing_is_told(tmp_path):
    write_checkpoint(tmp_path, {"weight": torch.zeros(2)})
    for command in ("plan", "load"):
        told = run([command, tmp_path, "--model", "torch.nn:Identity", "--allow-unexpected", "wieght"])
        assert (
            "--allow-unexpected wieght matches no tensor of the model or the checkpoint; similar: weight" in told.stderr
        )
        told = run([command, tmp_path, "--model", "torch.nn:Identity", "--allow-unexpected", "wei*"])
        assert (told.exit_code, told.stderr) == (0, "")


def test_advice_is_of_the_command_or_said_to_be_of_python(tmp_path):
    for name in ("a.safetensors", "b.safetensors", "c-00001-of-00002.safetensors", "c-00002-of-00002.safetensors"):
        write_checkpoint(tmp_path / "of", {name: torch.zeros(2)})
        next((tmp_path / "of").glob("model*.safetensors")).rename(tmp_path / name)
    told = run(["inspect", tmp_path]).stderr
    for line in told.splitlines():
        for advice in re.findall(r"hotweights\.open\(.*\)(.*)", line):
            assert advice.startswith(" in Python")
    (path,) = re.findall(r"a\.safetensors: (.*)", told)
    assert run(["inspect", *shlex.split(path)]).exit_code == 0
