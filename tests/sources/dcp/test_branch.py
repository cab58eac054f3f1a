"""Which dict of a nested state dict is opened, and what is said where it is not clear."""

import re

import pytest
import torch
from dcp_saved import save_dcp
from torch import nn

import hotweights as hw

MODEL = {"layer.weight": torch.ones(2, 2), "layer.bias": torch.ones(2)}
OPTIM = {
    "state": {"layer.weight": {"exp_avg": torch.zeros(2, 2), "step": torch.tensor(1.0)}},
    "param_groups": [{"lr": 1}],
}
BESIDE = {"optim": OPTIM, "step": 5, "rng": torch.zeros(4, dtype=torch.uint8)}


def names(folder, **options):
    with hw.open(folder, **options) as source:
        return sorted(source.manifest), source.warnings


@pytest.mark.parametrize(
    "state",
    [
        MODEL,
        {"model": MODEL},
        {"model": MODEL} | BESIDE,
        {"app": {"model": MODEL, "optim": OPTIM}},  # torch's own tutorial
        {
            **MODEL,
            "optimizer": OPTIM,
            "train_state": {"step": torch.tensor(3)},
            "dataloader": {"rank": 0},
        },  # torchtitan
        {"state_dict": MODEL, "optimizer_0": OPTIM},
        {"net": MODEL, "lr_scheduler": {"base": torch.ones(1)}},
    ],
    ids=["flat", "alone", "beside", "app", "torchtitan", "lightning", "other name"],
)
def test_the_model_is_opened_whatever_lies_beside_it(tmp_path, state):
    save_dcp(tmp_path / "ck", state)
    assert names(tmp_path / "ck") == (sorted(MODEL), ())
    model = nn.ModuleDict({"layer": nn.Linear(2, 2)})
    hw.load(model, tmp_path / "ck")
    assert (model["layer"].weight == 1).all()


def test_what_is_beside_it_can_be_asked_for(tmp_path):
    save_dcp(tmp_path / "ck", {"model": MODEL, "optim": OPTIM, "app": {"ema": MODEL}})
    held, warnings = names(tmp_path / "ck")
    assert held == sorted(MODEL)
    assert re.search(r"opened the model's dict, and passed over app; if .* mean: subfolder=\"app\"", warnings[0])
    assert names(tmp_path / "ck", subfolder="optim")[0] == ["state.layer.weight.exp_avg", "state.layer.weight.step"]
    assert names(tmp_path / "ck", subfolder="app/ema") == (sorted(MODEL), ())
    assert names(tmp_path, subfolder="ck") == names(tmp_path / "ck")
    assert names(tmp_path / "ck" / ".metadata", subfolder="app/ema") == (sorted(MODEL), ())


def test_an_optimiser_alone(tmp_path):
    save_dcp(tmp_path / "ck", {"optimizer": OPTIM})
    assert names(tmp_path / "ck")[0] == ["optimizer.state.layer.weight.exp_avg", "optimizer.state.layer.weight.step"]


def test_several_that_may_be_meant(tmp_path):
    other = {name: tensor + 1 for name, tensor in MODEL.items()}
    save_dcp(tmp_path / "ck", {"generator": MODEL, "critic": other, "count": torch.ones(1), "optim": OPTIM})
    with pytest.raises(hw.CheckpointError, match="holds several state dicts, and nothing says which") as caught:
        hw.open(tmp_path / "ck")
    ways = re.findall(r'subfolder="([^"]+)"', str(caught.value))
    assert sorted(ways) == [".", "critic", "generator"]
    held = {way: names(tmp_path / "ck", subfolder=way)[0] for way in ways}  # Each can be followed.
    assert held == {".": ["count"], "critic": sorted(MODEL), "generator": sorted(MODEL)}


def test_a_dict_that_is_not_there(tmp_path):
    save_dcp(tmp_path / "ck", {"model": MODEL, "optim": OPTIM})
    with pytest.raises(hw.CheckpointError, match='is called \'x\'; choose one: subfolder="model", subfolder="optim"'):
        hw.open(tmp_path / "ck", subfolder="x")
    save_dcp(tmp_path / "flat", MODEL)
    with pytest.raises(hw.CheckpointError, match="its tensors lie in no dict; leave subfolder= out"):
        hw.open(tmp_path / "flat", subfolder="x")


def test_names_that_look_nested_and_are_not(tmp_path):
    """transformers' names begin with ``model.``; they are no dict."""
    save_dcp(tmp_path / "ck", {"model.embed.weight": torch.ones(2), "lm_head.weight": torch.ones(2)})
    assert names(tmp_path / "ck")[0] == ["lm_head.weight", "model.embed.weight"]
    save_dcp(tmp_path / "in", {"model": {"model.embed.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}})
    assert names(tmp_path / "in")[0] == ["lm_head.weight", "model.embed.weight"]


def test_what_is_no_tensor_is_listed_and_not_read(tmp_path):
    save_dcp(tmp_path / "ck", {"model": MODEL} | BESIDE)
    with hw.open(tmp_path / "ck") as source:
        assert sorted(source.metadata[str(tmp_path / "ck" / ".metadata")]) == ["optim.param_groups.0.lr", "step"]
