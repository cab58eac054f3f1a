"""``hf://`` where the hub's own client has downloaded the revision: it is read from its cache."""

import logging
import os
import shlex
import shutil

import pytest
import torch
from torch import nn
from web import HubServer

import hotweights as hw
from hotweights.testing import write_checkpoint
from hotweights.testing.checks import assert_same_bits

OLD = {"weight": torch.randn(20, 30), "bias": torch.randn(20)}
NEW = {name: tensor + 1 for name, tensor in OLD.items()}
COMMIT, OTHER = HubServer.commit, "f" * 40


def cached(hub, commit=COMMIT, tensors=OLD, *, repo="models--org--name", refs=("main",), shards=2):
    """Lay a snapshot out as ``huggingface_hub`` does: blobs, and links to them."""
    folder = hub / repo
    snapshot, blobs = folder / "snapshots" / commit, folder / "blobs"
    write_checkpoint(snapshot, tensors, shards=shards)
    blobs.mkdir(exist_ok=True)
    for path in list(snapshot.iterdir()):
        blob = blobs / f"{commit}-{path.name}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    for ref in refs:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "home" / "hub"


@pytest.fixture
def serving(tmp_path, monkeypatch):
    folder = tmp_path / "served"
    write_checkpoint(folder, NEW, shards=2)
    with HubServer({path.name: path.read_bytes() for path in folder.iterdir()}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def read(address, **options):
    with hw.open(address, **options) as source:
        return dict(source.tensors())


@pytest.mark.parametrize("revision", ["", "@main", "@v1", "@refs/pr/1", f"@{COMMIT}"])
@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_the_cache_is_read(cache, serving, monkeypatch, revision, variable):
    snapshot = cached(cache, refs=("main", "v1", "refs/pr/1"))
    monkeypatch.setenv(variable, "1")
    with hw.open(f"hf://org/name{revision}") as source:
        assert_same_bits(dict(source.tensors()), OLD)
        assert source.files[0].startswith(str(snapshot))
    model = nn.Linear(30, 20)
    hw.load(model, f"hf://org/name{revision}")
    assert_same_bits(dict(model.state_dict()), OLD)
    assert not serving.asked


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"])
def test_where_the_variables_say_that_the_cache_is(tmp_path, monkeypatch, variable):
    cached(tmp_path / "elsewhere")
    monkeypatch.setenv("CACHE_OF_THIS_TEST", str(tmp_path / "elsewhere"))
    monkeypatch.setenv(variable, "$CACHE_OF_THIS_TEST")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_same_bits(read("hf://org/name"), OLD)


def test_a_commit_that_was_downloaded_is_read_without_asking(cache, serving):
    cached(cache)
    assert_same_bits(read(f"hf://org/name@{COMMIT}"), OLD)
    assert not serving.asked


def test_a_branch_that_moved_on_is_read_from_the_hub(cache, serving):
    cached(cache, OTHER)
    assert_same_bits(read("hf://org/name"), NEW)


def test_a_branch_that_did_not_move_is_asked_for_once_and_read_from_the_cache(cache, serving):
    snapshot = cached(cache)
    with hw.open("hf://org/name") as source:
        assert source.files[0].startswith(str(snapshot))
    assert [path for path, _ in serving.asked] == ["/api/models/org/name/revision/main"]
    assert not serving.cdn.asked


def test_a_hub_out_of_reach_is_said_and_the_cache_is_read(cache, monkeypatch, caplog):
    cached(cache, OTHER)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING, "hotweights"):
        assert_same_bits(read("hf://org/name", store={"deadline": 0.3}), OLD)
    assert "not to be had within" in caplog.text
    assert "what was downloaded before is read" in caplog.text


@pytest.mark.parametrize("lacks", ["model-00002-of-00002.safetensors", "model.safetensors.index.json"])
def test_what_is_not_whole_is_read_from_the_hub(cache, serving, lacks):
    snapshot = cached(cache)
    (snapshot / lacks).unlink()
    assert_same_bits(read(f"hf://org/name@{COMMIT}"), NEW)


def test_an_adapter_alone_is_not_the_model(cache, serving):
    snapshot = cached(cache, shards=1)
    (snapshot / "model.safetensors").rename(snapshot / "adapter_model.safetensors")
    assert_same_bits(read(f"hf://org/name@{COMMIT}"), NEW)


def test_folders_and_single_files(cache, monkeypatch):
    snapshot = cached(cache)
    weight = {"weight": OLD["weight"]}
    write_checkpoint(snapshot / "transformer", weight)
    (snapshot / "model_index.json").write_text("{}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_same_bits(read("hf://org/name/transformer"), weight)
    assert_same_bits(read("hf://org/name", subfolder="transformer"), weight)
    assert_same_bits(read("hf://org/name/transformer/model.safetensors"), weight)
    assert_same_bits(read("hf://org/name/model.safetensors.index.json"), OLD)


def test_offline_the_error_says_what_to_type(cache, serving, monkeypatch):
    """And it is what the hub's own client needs to be told."""
    pytest.importorskip("huggingface_hub")
    cached(cache, OTHER, refs=())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(hw.CheckpointError) as error:
        hw.open("hf://org/name")
    assert f"in the cache {cache}" in str(error.value)
    assert f"it holds {OTHER}, which can be given behind @" in str(error.value)
    assert_same_bits(read(f"hf://org/name@{OTHER}"), OLD)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    typed = shlex.split(str(error.value).split("`")[1])
    assert typed == ["hf", "download", "org/name"]
    downloaded(serving, cache)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_same_bits(read("hf://org/name"), NEW)
    with pytest.raises(hw.CheckpointError, match="`hf download org/name --revision v2` brings"):
        hw.open("hf://org/name@v2")
    with pytest.raises(hw.CheckpointError, match="`hf download org/data --repo-type dataset` brings"):
        hw.open("hf://datasets/org/data")


def downloaded(server, cache):
    """What the hub's own client lays there."""
    from huggingface_hub import constants, hf_hub_download

    constants.HF_HUB_OFFLINE, before = False, constants.HF_HUB_OFFLINE  # It was read when that was imported.
    try:
        for name in server.files:
            hf_hub_download("org/name", name, endpoint=server.url, cache_dir=cache, token=False)
    finally:
        constants.HF_HUB_OFFLINE = before


@pytest.mark.parametrize("ref", ["../../elsewhere", "", "nothing", "f" * 39])
def test_a_ref_that_names_no_commit_leads_nowhere(cache, monkeypatch, ref):
    snapshot = cached(cache)
    shutil.copytree(snapshot, cache / "elsewhere")
    (cache / "models--org--name" / "refs" / "main").write_text(ref)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(hw.CheckpointError, match="not whole in the cache"):
        hw.open("hf://org/name")


@pytest.mark.parametrize("address", ["hf://org/name@..%2F..%2Felsewhere", "hf://org/name/../../../elsewhere"])
def test_no_address_leads_out_of_its_repository(cache, monkeypatch, address):
    snapshot = cached(cache)
    shutil.copytree(snapshot, cache / "elsewhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(hw.CheckpointError, match="not whole in the cache"):
        hw.open(address)
