"""The JSON of every command is what docs/ci.md says of it, key by key."""

import json
import re
from pathlib import Path

import pytest
import torch
from broken_files import BROKEN_FILES
from processes import Child
from typer.testing import CliRunner

import hotweights
from hotweights.cli import COMMANDS, app
from hotweights.testing import write_checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "ci.md"
BY_NAME = {
    "phases",
    "metadata",
    "dtypes",
    "left",
    "fates",
    "casts",
    "tensors",
    "bytes_by_io",
    "steps",
    "mismatched",
    "tied",
}
BY_NAME |= {"waited"}


def documented():
    """By command, or state of a command, the keys of the page's table."""
    section = PAGE.read_text().partition("## JSON")[2].partition("\n## ")[0]
    found = {}
    for name, keys in re.findall(r"^\| `([^`|]+)` \| ([^|]+) \|.*\|$", section, re.M):
        found[name] = set(re.findall(r"`([^`]+)`", keys))
    return found


def keys_of(value, prefix=""):
    """``a``, ``list[].b``, ``dict.c``; not those that are names of somebody's."""
    found = set()
    for key, inner in value.items():
        found.add(prefix + key)
        if isinstance(inner, dict) and key not in BY_NAME:
            found |= keys_of(inner, f"{prefix}{key}.")
        elif isinstance(inner, list) and inner and isinstance(inner[0], dict):
            for each in inner:
                found |= keys_of(each, f"{prefix}{key}[].")
    return found


def printed(*args, code=0):
    result = CliRunner().invoke(app, [*map(str, args), "--json"])
    assert result.exit_code == code, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


@pytest.fixture
def bert(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def receive(pipe, address, model):
    result = CliRunner().invoke(app, ["receive", "--from", address, "--model", str(model), "--json"])
    pipe.send(result.output)


def test_every_key_is_documented(bert, tmp_path):
    other = write_checkpoint(tmp_path / "other", {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.float16)})
    first = write_checkpoint(tmp_path / "first", {"a": torch.zeros(2), "b": torch.ones(2)})
    address = f"unix:{tmp_path / 'run' / 'socket'}"
    found = {
        "inspect": printed("inspect", bert),
        "verify": printed("verify", bert),
        "diff": printed("diff", first, other, code=1),
        "copy": printed("copy", bert, tmp_path / "copy"),
        "convert": printed("convert", bert, tmp_path / "convert", "--dtype", "BF16"),
        "plan": printed("plan", bert, "--model", bert),
        "plan --explain": printed("plan", bert, "--model", bert, "--explain", "pooler.dense.bias"),
        "load": printed("load", bert, "--model", bert),
        "follow": printed("follow", bert, "--versions", 1, "--interval", "0.001"),
        "an error": printed("inspect", tmp_path / "nothing", code=1),
    }
    several = CliRunner().invoke(app, ["inspect", str(first), str(other), "--json"]).stdout.splitlines()
    found["inspect A B"] = json.loads(several[0])
    with Child(receive, address, bert) as child:
        found["send"] = printed("send", bert, "--to", address)
        found["receive"] = json.loads(child.heard())
    told = documented()
    assert {name: keys_of(value) for name, value in found.items()} == told
    # Each other command prints none; docs/hosts.md tells of resolve.
    assert {name.split()[0] for name in told} - {"an"} == set(COMMANDS) - {"relay", "keys", "demo", "resolve"}


def test_path_is_what_was_typed(tmp_path):
    place = write_checkpoint(tmp_path / "a b\nc", {"a": torch.zeros(2)})
    broken = tmp_path / "none"
    for command in ("inspect", "verify"):
        assert printed(command, place)["path"] == str(place)
        refused = printed(command, broken, code=1)
        assert (refused["path"], refused["error"]["kind"]) == (str(broken), "CheckpointError")
        lines = CliRunner().invoke(app, [command, str(place), str(broken), "--json"]).stdout.splitlines()
        assert [json.loads(line)["path"] for line in lines] == [str(place), str(broken)]
    refused = printed("diff", place, broken, code=2)
    assert (refused["first"], refused["second"]) == (str(place), str(broken))
    refused = printed("copy", broken, tmp_path / "to", code=1)
    assert (refused["from"], refused["path"]) == (str(broken), str(tmp_path / "to"))
    for command in ("plan", "load"):
        assert printed(command, broken, "--model", tmp_path, code=1)["path"] == str(broken)


def test_follow_says_an_error_in_one_line(tmp_path):
    hotweights.save({"a": torch.ones(2)}, tmp_path / "one")
    how = ["follow", str(tmp_path), "--versions", "2", "--timeout", "0.01", "--interval", "0.001", "--json"]
    result = CliRunner().invoke(app, how)
    first, second = map(json.loads, result.stdout.splitlines())
    assert result.exit_code == 1
    assert (first["name"], second["path"], second["error"]["kind"]) == ("one", str(tmp_path), "CheckpointError")


def causes():
    """Those that docs/ci.md lists."""
    table = PAGE.read_text().partition("| `error.cause` |")[2].partition("\n\n")[0]
    return {name for cells in re.findall(r"^\| ([^|]+) \|", table, re.M) for name in re.findall(r"`(\w+)`", cells)}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_has_a_cause_that_is_documented(name, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BROKEN_FILES[name][0])
    alone = printed("inspect", path, code=1)["error"]["cause"]
    assert alone in causes() - {"invalid"}
    assert printed("inspect", tmp_path, code=1)["error"]["cause"] == alone  # As one of a folder's.


def test_every_cause_in_the_code_is_documented():
    source = Path(hotweights.__file__).parent
    found = {cause for file in source.rglob("*.py") for cause in re.findall(r'\bcause="(\w+)"', file.read_text())}
    assert found <= causes()
    assert causes() - found <= {"missing_shard", "duplicate_tensor", "several", "invalid", "changed", "store"}


@pytest.mark.parametrize("name", ["model.safetensors.incomplete", "model.safetensors.crdownload"])
def test_a_download_alone_is_unfinished(name, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    assert printed("inspect", tmp_path, code=1)["error"]["cause"] == "unfinished"


def test_random_bytes_are_no_safetensors(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(bytes(range(200, 250)))
    error = printed("inspect", tmp_path / "m.safetensors", code=1)["error"]
    assert error["cause"] == "not_safetensors"
    assert "no safetensors file: its first 8 bytes say a header of " in error["message"]
    assert error["message"].endswith(", and the file has 50")


def test_causes_of_folders(tmp_path):
    whole = write_checkpoint(tmp_path / "whole", {"a": torch.zeros(2), "b": torch.ones(4)}, shards=2)
    (tmp_path / "none").mkdir()
    first, second = sorted(whole.glob("*.safetensors"))
    assert printed("inspect", tmp_path / "none", code=1)["error"]["cause"] == "no_weights"
    assert printed("inspect", tmp_path / "nowhere", code=1)["error"]["cause"] == "not_found"
    second.rename(tmp_path / "second")
    assert printed("verify", whole, code=1)["error"]["cause"] == "missing_shard"
    second.write_bytes((tmp_path / "second").read_bytes()[:-1])
    assert printed("verify", whole, code=1)["error"]["cause"] == "truncated"
    first.write_bytes(b"")
    error = printed("diff", whole, tmp_path / "second", code=2)["error"]
    assert (error["cause"], error["causes"]) == ("several", ["empty", "truncated"])
    plan = printed("plan", tmp_path / "second", "--model", "torch.nn:Nothing", code=2)
    assert plan["error"]["cause"] == "usage_error"
