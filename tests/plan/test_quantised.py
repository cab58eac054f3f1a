"""A quantised checkpoint for a model that is not is refused by the name of the method, in one line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hotweights as hw

CHECKPOINTS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq or gptq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape"),
    "fp8, block by block": ("weight", "weight_scale_inv"),
    "compressed-tensors or fp8": ("weight", "weight_scale"),
    "compressed-tensors or quark": ("weight", "weight_scale", "weight_zero_point"),
    "vptq": ("indices", "centroids.weight", "weight_scale"),
    "aqlm": ("codes", "codebooks", "scales"),
    "hqq": ("W_q", "scale", "zero"),
    "eetq": ("weight", "weight_scales"),
    "quanto": ("weight._data", "weight._scale", "input_scale"),
    "mxfp4": ("up_proj_blocks", "up_proj_scales"),
    "bitsandbytes": ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"),
}


@pytest.mark.parametrize(("method", "names"), CHECKPOINTS.items(), ids=CHECKPOINTS)
def test_it_is_refused_by_the_method(method, names):
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    before = model[0].weight.clone()
    with pytest.raises(hw.PlanError) as caught:
        hw.load(model, {f"0.{name}": torch.ones(4, 4) for name in names})
    (line,) = str(caught.value).splitlines()
    assert f"is quantised by {method} (0." in line
    assert "from_pretrained" in line
    assert "allow_" not in str(caught.value)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("scale", ["weight_scale_inv", "weight_scale", "SCB"])
def test_its_weights_are_not_loaded_without_their_scales(scale, dtype):
    """Allowed or not: they would be wrong by a factor, and nothing else would say so."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    before = model[0].weight.clone()
    source = {"0.weight": torch.ones(4, 4).to(dtype), f"0.{scale}": torch.ones(4, 1)}
    for cast in ("error", "floats", "loader"):
        with pytest.raises(hw.PlanError, match=rf"0\.weight.*what scales it, 0\.{scale}, has no place") as caught:
            hw.load(model, source, allow_unexpected="*", cast=cast)
        assert "load a checkpoint with plain weights" in str(caught.value)
    assert torch.equal(model[0].weight, before)


def test_what_is_wrong_besides_is_said_too():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2), nn.Linear(4, 4))
    source = {"0.qweight": torch.ones(1, 4), "0.qzeros": torch.ones(1, 4), "1.weight": torch.ones(3, 4)}
    with pytest.raises(hw.PlanError) as caught:
        hw.load(model, source | {"2.weight": torch.ones(4, 4), "2.bias": torch.ones(4)})
    bias, weight, quantised = caught.value.problems
    assert bias.startswith("1.bias: missing")
    assert weight.startswith("1.weight: shape [2, 4] expected, [3, 4] found")
    assert quantised.startswith("the checkpoint is quantised by awq or gptq")
    assert 'allow_mismatched="1.weight"' in caught.value.advice


def test_a_scale_of_a_weight_that_is_not_quantised_may_be_left_out():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    hw.load(model, {"0.weight": torch.ones(4, 4).bfloat16(), "0.weight_scale": torch.ones(1)}, allow_unexpected="*")
    assert torch.equal(model[0].weight, torch.ones(4, 4))


def test_a_model_that_has_such_tensors_takes_them():
    model = nn.Linear(4, 4, bias=False)
    model.register_buffer("weight_scale", torch.zeros(1))
    hw.load(model, {"weight": torch.ones(4, 4), "weight_scale": torch.ones(1)})
    assert model.weight_scale.tolist() == [1]


def test_other_names_that_nobody_takes_get_the_usual_advice():
    with pytest.raises(hw.PlanError, match="allow_unexpected=") as caught:
        hw.load(nn.Linear(4, 4, bias=False), {"weight": torch.ones(4, 4), "draft": torch.ones(1)})
    assert "quantised" not in str(caught.value)
