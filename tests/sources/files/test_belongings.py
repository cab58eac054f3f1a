"""What goes along with the weights of a model's directory, and what does not."""

import json
import os

import pytest
import torch

import hotweights as hw
from hotweights.sources.files.belongings import belongings
from hotweights.testing import write_checkpoint


def write(directory, *names):
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


@pytest.fixture
def model(tmp_path):
    return write_checkpoint(tmp_path / "model", {"a": torch.ones(2)})


def test_files_and_folders(model):
    goes = ["LICENSE", "README.md", "config.json", "merges.txt", "spiece.model", "vocab.bpe"]
    goes += ["1_Pooling/config.json", "assets/fig/logo.png"]
    stays = ["pytorch_model.bin", "optimizer.pt", "model.gguf", "tf_model.h5"]
    hidden = [".gitattributes", ".cache/x", "1_Pooling/.x", "pytorch_model.bin.index.json"]
    weights = ["onnx/config.json", "onnx/model.onnx", "onnx/model.onnx_data", "original/a/consolidated.00.pth"]
    write(model, *goes, *stays, *hidden, *weights)
    found = belongings(model, (str(model / "model.safetensors"),))
    assert set(found.files) == set(goes)
    assert set(found.left) == {*stays, "onnx/", "original/"}
    assert found.left["onnx/"] == "holds weights: model.onnx"
    assert found.left["original/"] == "holds weights: a/consolidated.00.pth"


def test_modules_of_sentence_transformers_go_with_their_weights(model):
    write(model, "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "onnx/model.onnx")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (model / "modules.json").write_text(json.dumps(modules))
    found = belongings(model, (str(model / "model.safetensors"),))
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"} == set(
        found.files
    )
    assert set(found.left) == {"onnx/"}


@pytest.mark.parametrize("text", ["", "{", "3", "[3]", '[{"path": 3}]', '{"path": 1}', "[" * 100_000])
def test_a_broken_list_of_modules(text, model):
    (model / "modules.json").write_text(text)
    assert set(belongings(model).files) == {"modules.json"}


def test_links(model, tmp_path):
    write(tmp_path, "secret", "elsewhere/a.json")
    write(model, "config.json", "1_Pooling/config.json")
    for name, to in {
        "inner.json": "config.json",
        "1_Pooling/inner.json": "../config.json",
        "outer.json": "../secret",
        "1_Pooling/outer.json": str(tmp_path / "secret"),
        "nowhere.json": "nothing",
        "loop.json": "loop.json",
        "folder": "1_Pooling",
        "1_Pooling/folder": "..",
        "out": "../elsewhere",
    }.items():
        (model / name).symlink_to(to)
    os.mkfifo(model / "pipe.json")
    found = belongings(model, (str(model / "model.safetensors"),))
    assert set(found.files) == {"config.json", "inner.json", "1_Pooling/config.json", "1_Pooling/inner.json"}
    assert found.left == {
        "outer.json": "a link that leads out of the directory",
        "1_Pooling/outer.json": "a link that leads out of the directory",
        "nowhere.json": "a link that leads nowhere",
        "loop.json": "a link that leads nowhere",
        "folder/": "a link to a folder",
        "1_Pooling/folder": "a link to a folder",
        "out/": "a link to a folder",
        "pipe.json": "a pipe, a socket or a device",
    }
    (tmp_path / "link").symlink_to("model")  # To the directory itself people may link.
    assert set(belongings(tmp_path / "link").files) == set(found.files)


def test_a_snapshot_of_a_hub_cache(tmp_path):
    """Each of its files is a link to a blob."""
    repository = tmp_path / "models--org--name"
    write(repository, "blobs/1", "blobs/2", "refs/other")
    snapshot = repository / "snapshots" / "abc"
    (snapshot / "1_Pooling").mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/2")
    (snapshot / "other.json").symlink_to("../../refs/other")
    assert set(belongings(snapshot).files) == {"config.json", "1_Pooling/config.json"}


class TestSave:
    """``beside=`` with names in folders."""

    def test_a_new_directory_and_one_that_exists(self, tmp_path):
        write(tmp_path, "pool.json")
        beside = {"1_Pooling/config.json": tmp_path / "pool.json", "config.json": str(tmp_path / "pool.json")}
        (tmp_path / "b").mkdir()
        for name in ("a", "b", "b"):  # The second time the same content lies there.
            assert hw.save({"a": torch.ones(2)}, tmp_path / name, beside=beside).warnings == ()
            assert (tmp_path / name / "1_Pooling" / "config.json").read_text() == "pool.json"
        assert sorted(os.listdir(tmp_path / "b")) == ["1_Pooling", "config.json", "model.safetensors"]

    @pytest.mark.parametrize("there", ["content", "link", "folder link", "file"])
    def test_nothing_of_others_is_replaced(self, there, tmp_path):
        write(tmp_path, "pool.json", "elsewhere/config.json")
        target = tmp_path / "b"
        hw.save({"a": torch.zeros(2)}, target)
        before = (target / "model.safetensors").read_bytes()
        if there == "file":
            write(target, "1_Pooling")
        elif there == "folder link":
            (target / "1_Pooling").symlink_to("../elsewhere")
        else:
            (target / "1_Pooling").mkdir()
            if there == "link":
                (target / "1_Pooling" / "config.json").symlink_to("../../elsewhere/config.json")
            else:
                write(target, "1_Pooling/config.json")
        with pytest.raises(hw.SaveError, match=r"1_Pooling.* and nothing was saved; remove it"):
            hw.save({"a": torch.ones(2)}, target, beside={"1_Pooling/config.json": tmp_path / "pool.json"})
        assert (target / "model.safetensors").read_bytes() == before
        assert (tmp_path / "elsewhere" / "config.json").read_text() == "elsewhere/config.json"
        assert sorted(os.listdir(target)) == ["1_Pooling", "model.safetensors"]

    @pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "", "a//b", "./a", "a/"])
    def test_names_that_lead_out(self, name, tmp_path):
        write(tmp_path, "x.json")
        with pytest.raises(hw.UsageError, match="is no name in the directory"):
            hw.save({"a": torch.ones(2)}, tmp_path / "b", beside={name: tmp_path / "x.json"})
        assert os.listdir(tmp_path) == ["x.json"]
