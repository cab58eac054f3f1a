"""What lies beside the weights in a store goes along with a copy, by the rule of directories."""

import json
import os

import pytest
import torch
from clouds import Azure
from typer.testing import CliRunner
from web import HubServer, Web, served

from hotweights.cli import app
from hotweights.testing import write_checkpoint

BESIDE = {
    "config.json": b"{}",
    "tokenizer.json": b"x" * 200_000,
    "LICENSE": b"free",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"other weights",
    ".gitattributes": b"*.safetensors lfs",
    "assets/vocab.txt": b"a b",
    "assets/deep/merges.txt": b"a b",
    ".cache/huggingface/x.metadata": b"",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"weights",
    "2_Dense/config.json": b"{}",
    "2_Dense/model.safetensors": b"of a module",
    "modules.json": json.dumps([{"path": ""}, {"path": "2_Dense"}]).encode(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("made"), {"a": torch.ones(3), "b": torch.ones(2)}, shards=2)
    for name, content in BESIDE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def copied(what, to):
    done = CliRunner().invoke(app, ["copy", str(what), str(to), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    return set(said["beside"]), said["left"]


def there(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def azure(folder, monkeypatch):
    with Azure(served(folder)) as server:
        variables = {"STORAGE_ACCOUNT_NAME": "account", "ENDPOINT": f"{server.url}/account", "SKIP_SIGNATURE": "true"}
        for name, value in {**variables, "ALLOW_HTTP": "true"}.items():
            monkeypatch.setenv(f"AZURE_{name}", value)
        yield server


@pytest.fixture
def hub(folder, monkeypatch):
    files = {name.removeprefix("m/"): content for name, content in served(folder).items()}
    with HubServer(files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield "hf://org/name"


def test_a_copy_from_a_store_is_a_copy_of_the_directory(folder, azure, tmp_path):
    assert copied("az://b/m", tmp_path / "of store") == copied(folder, tmp_path / "of disk")
    assert there(tmp_path / "of store") == there(tmp_path / "of disk")
    assert "2_Dense/model.safetensors" in there(tmp_path / "of store")


def test_a_copy_from_one_place_of_a_store_to_another(folder, azure, tmp_path):
    copied(folder, "az://b/first")
    copied("az://b/first", "az://b/second")
    copied("az://b/second", tmp_path / "back")
    copied(folder, tmp_path / "of disk")
    assert there(tmp_path / "back") == there(tmp_path / "of disk")


def test_a_copy_from_a_hub(folder, hub, tmp_path):
    assert copied(hub, tmp_path / "of hub") == copied(folder, tmp_path / "of disk")
    assert there(tmp_path / "of hub") == there(tmp_path / "of disk")


def test_the_web_is_asked_for_the_usual_names(folder, tmp_path):
    with Web(served(folder)) as web:
        beside, left = copied(f"{web.url}/m", tmp_path / "of web")
    assert beside == {"config.json", "tokenizer.json", "LICENSE", "chat_template.jinja"}
    assert left == {}


@pytest.mark.parametrize("what", ["az://b/m/model.safetensors.index.json", "DIR/model.safetensors.index.json"])
def test_of_an_index_only_the_weights_are_copied(folder, azure, tmp_path, what):
    assert copied(what.replace("DIR", str(folder)), tmp_path / "new") == (set(), {})
    assert os.listdir(tmp_path / "new") == ["model.safetensors"]


def test_one_file_takes_nothing_along(azure, tmp_path):
    assert copied("az://b/m", tmp_path / "new.safetensors") == (set(), {})
