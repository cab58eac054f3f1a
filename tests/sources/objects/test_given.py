"""Stores of obstore and file systems of fsspec that the caller made, with ``store=``."""

from pathlib import Path

import pytest
import torch

import hotweights as hw
from hotweights.testing import SOURCE_CONTRACT, write_checkpoint
from hotweights.testing.checks import assert_same_bits

TENSORS = {"weight": torch.randn(40, 1000), "bias": torch.arange(7), "half": torch.randn(33).to(torch.bfloat16)}


def in_memory(folder):
    obstore = pytest.importorskip("obstore")
    store = obstore.store.MemoryStore()
    for path in folder.rglob("*.*"):
        obstore.put(store, f"run/{path.relative_to(folder)}", path)
    return store


def on_disk(folder):
    store = pytest.importorskip("obstore").store.LocalStore(folder.parent)
    folder.rename(folder.with_name("run"))
    return store


def of_fsspec(folder):
    files = pytest.importorskip("fsspec").filesystem("memory")
    files.rm("/run", recursive=True) if files.exists("/run") else None
    files.put(f"{folder}/", "/run/", recursive=True)
    return files


def of_a_folder(folder):
    fsspec = pytest.importorskip("fsspec")
    folder.rename(folder.with_name("run"))
    return fsspec.filesystem("dir", path=str(folder.parent), fs=fsspec.filesystem("file"))


@pytest.fixture(params=[in_memory, on_disk, of_fsspec, of_a_folder], ids=lambda make: make.__name__)
def store(request, tmp_path):
    write_checkpoint(tmp_path / "made" / "x", TENSORS, shards=2)
    return request.param(tmp_path / "made" / "x")


@pytest.mark.parametrize("what", ["run", Path("run"), "run/model.safetensors.index.json"], ids=str)
def test_a_path_in_a_store(store, what):
    for _ in range(2):  # It stays open.
        with hw.open(what, store=store) as source:
            assert_same_bits(dict(source.tensors()), TENSORS)
            source.check()


@pytest.mark.parametrize("check", SOURCE_CONTRACT, ids=lambda check: check.__name__)
def test_the_contract_of_sources(store, check):
    check(lambda: hw.open("run", store=store), TENSORS)


def test_a_list_of_paths(store):
    with hw.open([f"run/model-0000{n}-of-00002.safetensors" for n in (1, 2)], store=store) as source:
        assert set(source.manifest) == set(TENSORS)


def test_what_is_not_there(store):
    with pytest.raises(hw.CheckpointError, match="it is empty"):
        hw.open("nothing", store=store)
    with pytest.raises(hw.CheckpointError, match="there is no such"):
        hw.open("run/nothing.safetensors", store=store)


def test_a_file_that_is_replaced(tmp_path):
    files = of_fsspec(write_checkpoint(tmp_path / "x", {"a": torch.arange(20_000)}))
    with hw.open("run", store=files) as source:
        files.pipe("/run/model.safetensors", files.cat("/run/model.safetensors") + b"!")
        with pytest.raises(hw.CheckpointChanged, match="was replaced"):
            dict(source.tensors())


def test_a_checkpoint_is_saved_to_a_store_of_the_caller(tmp_path):
    store = in_memory(tmp_path)
    hw.save(TENSORS, "run", store=store, shard_size=1000)
    with hw.open("run", store=store) as source:
        assert_same_bits(dict(source.tensors()), TENSORS)


def test_file_systems_are_only_read(tmp_path):
    files = pytest.importorskip("fsspec").filesystem("memory")
    with pytest.raises(hw.UsageError, match="file systems of fsspec are only read"):
        hw.save(TENSORS, "run", store=files)


def test_what_is_no_store():
    with pytest.raises(hw.UsageError, match="a store of obstore, or a file system of fsspec; found 3"):
        hw.open("run", store=3)
    with pytest.raises(hw.UsageError, match="the reader 'safetensors' reads files, no stores"):
        hw.open("run", store=pytest.importorskip("fsspec").filesystem("memory"), reader="safetensors")
