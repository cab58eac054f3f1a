"""Objects that are replaced, removed or cut short while a command or a function reads them: one error, nothing half.

The server changes them between two requests of one reading: some of its bytes are old ones.
"""

import json
import re

import pytest
import torch
from torch import nn
from typer.testing import CliRunner
from web import Web, served, status

import hotweights as hw
from hotweights.cli import app
from hotweights.testing import write_checkpoint
from hotweights.testing.checks import assert_same_bits

TENSORS = {"weight": torch.arange(1_200_000, dtype=torch.float64).view(1200, 1000), "bias": torch.randn(1200)}
OTHERS = {name: tensor + 1 for name, tensor in TENSORS.items()}
KEY = "m/model.safetensors"


class Changing(dict):
    """What a server has: after so many looks at one object it is another one, or away."""

    def __init__(self, files, new, after):
        super().__init__(files)
        self.new, self.left = new, after

    def get(self, key, default=None):
        if key != KEY:
            return super().get(key, default)
        self.left -= 1
        return super().get(key) if self.left >= 0 else self.new


CHANGES = {
    "replaced": lambda old: old[:-1] + b"!",
    "removed": lambda old: None,
    "cut short": lambda old: old[: len(old) // 2],
    "cut to nothing": lambda old: b"",
}
# What shows it: a condition, or, where the server has no tags, the size.
CASES = [(change, "strong") for change in CHANGES] + [("removed", None), ("cut short", None), ("cut to nothing", None)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("served"), TENSORS)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}, {case[1]} tags")
def changing(folder, request):
    """An address; the opening and one request of what is read see the old object."""
    change, tags = request.param
    files = served(folder)
    with Web(Changing(files, CHANGES[change](files[KEY]), after=2), tags=tags) as web:
        yield f"{web.url}/{KEY}"


SAYS = (
    r"m/model\.safetensors bytes \d+\.\.\d+: the object (was replaced after it was opened|went away while it was open)"
)

COMMANDS = {
    "verify": ["verify", "ADDRESS"],
    "diff": ["diff", "ADDRESS", "DIR"],
    "copy": ["copy", "ADDRESS", "NEW"],
    "convert": ["convert", "ADDRESS", "NEW", "--dtype", "BF16"],
    "verify --write": ["verify", "ADDRESS", "--write", "NEW"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_refused_and_has_written_nothing(changing, folder, tmp_path, name):
    words = {"ADDRESS": changing, "DIR": str(folder), "NEW": str(tmp_path / "new")}
    done = CliRunner().invoke(app, [*(words.get(word, word) for word in COMMANDS[name]), "--json"])
    assert done.exit_code == (2 if name == "diff" else 1), done.output
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "CheckpointChanged"
    assert re.search(SAYS, error["message"])
    assert len(error["message"].splitlines()) == 1
    assert not list(tmp_path.iterdir())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1200, 1000, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(1200))


def test_a_load_says_that_a_part_of_the_model_is_written(changing):
    with pytest.raises(hw.CheckpointChanged, match=SAYS) as error:
        hw.load(Model(), changing)
    assert "had been read into the model by then" in " ".join(error.value.__notes__)


def test_a_live_model_keeps_its_version(changing):
    live = hw.LiveModel(Model())
    live.load(OTHERS, version=1)
    with pytest.raises(hw.UpdateAborted, match=SAYS):
        live.update(changing, version=2)
    assert live.version == 1
    assert_same_bits(dict(live.model.state_dict()), OTHERS)


@pytest.mark.parametrize("command", ["copy", "convert"])
def test_what_lay_at_the_target_of_a_copy_stays(changing, bucket, command):
    old = {"weight": torch.arange(40_000), "bias": torch.arange(40_000.0)}
    hw.save(old, "az://b/new", shard_size="200kB")
    before = set(bucket.server.files)
    done = CliRunner().invoke(app, [command, changing, "az://b/new", "--shard-size", "9MB"])
    assert done.exit_code == 1
    assert re.search(SAYS, done.output)
    assert set(bucket.server.files) == before
    with hw.open("az://b/new") as source:
        assert_same_bits(dict(source.tensors()), old)


@pytest.mark.parametrize("how", ["replaced", "removed", "refused"])
def test_a_copy_that_cannot_be_read_back_is_said_to_be_whole(bucket, tmp_path, how):
    """The journal is deleted last: from then on another one writes there, or the store answers no more."""
    write_checkpoint(tmp_path, {"a": torch.arange(40_000), "b": torch.arange(40_000.0)})

    def then(handler, *answer):
        if handler.command == "POST":
            files = bucket.server.files
            first = min(key for key in files if key.endswith(".safetensors"))
            if how == "refused":
                bucket.always = status(503)
            elif how == "removed":
                del files[first]
            else:
                bucket.server.write(first, files[first][:-1] + b"!")
        return answer

    bucket.always_of_writes = then
    done = CliRunner().invoke(app, ["copy", str(tmp_path), "az://b/m", "--shard-size", "200kB", "--deadline", "1"])
    assert done.exit_code == 1
    said = {
        "replaced": "az://b/m: what was written reads back otherwise",
        "removed": "named by the index for",
        "refused": "not to be had within 1 s",
    }[how]
    assert said in done.output
    assert ("az://b/m was written whole" in done.output) == (how != "replaced")


@pytest.mark.parametrize("change", ["replaced", "removed", "cut short"])
def test_follow_passes_over_what_changes_while_it_looks(bucket, change, caplog):
    """Between its list and its opening."""
    hw.save({"a": torch.arange(40_000), "b": torch.arange(40_000.0)}, "az://b/runs/step-1", shard_size="200kB")
    hw.save({"a": torch.arange(10)}, "az://b/runs/step-2")
    key = "runs/step-1/model-00002-of-00002.safetensors"
    sound = bucket.server.files[key]
    versions = hw.follow("az://b/runs", interval=1)
    now = [0.0]
    versions._clock = lambda: now[0]
    with versions:
        assert versions.look() == []

        def then(handler, code, headers, body):
            if "comp=list" in handler.path:
                new = {"replaced": b"no weights" * 10, "removed": None, "cut short": sound[:-1]}[change]
                bucket.server.write(key, new) if new is not None else bucket.server.files.pop(key, None)
                bucket.always = None
            return code, headers, body

        bucket.always = then
        now[0] += 1
        assert [version.name for version in versions.look()] == ["step-2"]
        assert "step-1" in caplog.text
        hw.save({"a": torch.arange(10)}, "az://b/runs/step-1")
        found = []
        for _ in range(2):
            found += versions.look()
            now[0] += 1
    assert [version.name for version in found] == ["step-1"]
