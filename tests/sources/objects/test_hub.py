"""``hf://``: models on a hub, read by ranges, as the hub's own client would read them."""

from pathlib import Path

import pytest
import torch
from torch import nn
from web import HubServer

import hotweights as hw
from hotweights.sources.objects import hub as hub_module
from hotweights.testing import write_checkpoint
from hotweights.testing.checks import assert_same_bits

TENSORS = {"weight": torch.randn(200, 300), "bias": torch.randn(200)}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    write_checkpoint(folder, TENSORS, shards=2)
    (folder / "config.json").write_text("{}")
    write_checkpoint(folder / "transformer", {"weight": TENSORS["weight"]})
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with HubServer(files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def read(address, **options):
    with hw.open(address, **options) as source:
        return dict(source.tensors())


def test_a_model_and_what_its_files_are_called(hub):
    with hw.open("hf://org/name") as source:
        assert_same_bits(dict(source.tensors()), TENSORS)
        assert source.files[0] == "hf://org/name/model-00001-of-00002.safetensors"
        source.check()
    model = nn.Linear(300, 200)
    hw.load(model, "hf://org/name")
    assert_same_bits(dict(model.state_dict()), TENSORS)


@pytest.mark.parametrize("revision", ["main", "refs/pr/1", "refs%2Fpr%2F1", HubServer.commit])
def test_a_revision_is_looked_up_once_and_only_its_commit_is_read(hub, revision):
    assert_same_bits(read(f"hf://org/name@{revision}"), TENSORS)
    first, *others = [path for path, _ in hub.asked]
    assert first.startswith("/api/models/org/name/revision/")
    assert others
    assert all(f"/resolve/{hub.commit}/" in path for path in others)


def test_a_folder_and_one_file(hub):
    weight = {"weight": TENSORS["weight"]}
    assert_same_bits(read("hf://org/name/transformer"), weight)
    assert_same_bits(read("hf://org/name", subfolder="transformer"), weight)
    assert_same_bits(read("hf://org/name@main/transformer/model.safetensors"), weight)


def test_what_the_hubs_own_client_downloads_is_the_same(hub, tmp_path, monkeypatch):
    client = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # It was read when it was imported.
    path = client.hf_hub_download(
        "org/name", "transformer/model.safetensors", endpoint=hub.url, cache_dir=tmp_path / "cache", token=False
    )
    assert_same_bits(read(path), read("hf://org/name/transformer"))
    assert Path(path).parent.parent.name == hub.commit


def test_the_token_goes_to_the_hub_and_to_nobody_else(hub, monkeypatch, tmp_path):
    hub.token = "s3cret"
    with pytest.raises(hw.StoreError, match="401 Unauthorized; set HF_TOKEN, or run `hf auth login`; gated models"):
        read("hf://org/name")
    ways = [lambda: {"store": {"token": "s3cret"}}]

    def by_variable():
        monkeypatch.setenv("HF_TOKEN", "s3cret")
        return {}

    def by_file():
        monkeypatch.delenv("HF_TOKEN")
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "token").write_text("s3cret\n")
        return {}

    for way in (*ways, by_variable, by_file):
        assert_same_bits(read("hf://org/name", **way()), TENSORS)
    assert hub.cdn.asked
    assert not any(authorization for _, authorization, _ in hub.cdn.asked)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    for store in (None, {"token": False}):
        with pytest.raises(hw.StoreError, match="401"):
            read("hf://org/name", store=store)
    with pytest.raises(hw.StoreError) as error:
        read("hf://org/name", store={"token": "wr0ng"})
    assert "wr0ng" not in str(error.value)


def test_a_model_that_has_another_name_now(hub):
    hub.renamed = "old/called"
    assert_same_bits(read("hf://old/called"), TENSORS)


def test_a_rank_reads_its_rows_only(tmp_path, monkeypatch):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1000, 1000))

        def load_weights(self, weights):
            for _, tensor in weights:
                self.weight.data.copy_(tensor[1000:2000])

    whole = torch.randn(8000, 1000)
    write_checkpoint(tmp_path / "model", {"weight": whole})
    with HubServer({"model.safetensors": (tmp_path / "model" / "model.safetensors").read_bytes()}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        model = Rows()
        report = hw.load(model, "hf://org/name")
        assert torch.equal(model.weight, whole[1000:2000])
        assert report.bytes_read < whole.nbytes / 7
        assert all(span for _, _, span in hub.cdn.asked)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("hf://org/other", "the hub knows no such model or revision"),
        ("hf://org/name@v9", "the hub knows no such model or revision"),
        ("hf://org/name/nothing", "it is empty"),
        ("hf://org/name/nothing.safetensors", "there is no such file"),
    ],
)
def test_what_is_not_there(hub, address, says):
    with pytest.raises(hw.CheckpointError, match=says):
        hw.open(address)


def test_something_else_than_a_hub_answers(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.cdn.url)
    hub.cdn.files["api/models/org/name/revision/main"] = b"<html>"
    with pytest.raises(hw.StoreError, match="403"):
        hw.open("hf://org/name", store={"deadline": 0.3})


@pytest.mark.parametrize(
    ("address", "options", "says"),
    [
        ("hf://a/b@", {}, "a model's address is hf://org/name"),
        ("hf://org/name", {"store": {"region": "x"}}, "options that a hub does not know: region"),
        (["hf://org/a/x.safetensors", "hf://org/b/y.safetensors"], {}, "of one store"),
    ],
)
def test_what_makes_no_sense(address, options, says):
    with pytest.raises(hw.UsageError, match=says):
        hw.open(address, **options)


def test_a_commit_is_no_place_of_versions(hub):
    for ask in (hw.Receiver, hw.Sender, hw.follow):
        with pytest.raises(hw.UsageError, match="a commit on a hub never changes"):
            ask("hf://org/name")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("gpt2", (("models", "gpt2", "main"), "")),
        ("org/name@v1.0/a/b.safetensors", (("models", "org/name", "v1.0"), "a/b.safetensors")),
        ("org/name@refs/pr/7/a", (("models", "org/name", "refs/pr/7"), "a")),
        ("datasets/org/name", (("datasets", "org/name", "main"), "")),
    ],
)
def test_addresses(text, found):
    assert hub_module.repository(text) == found
