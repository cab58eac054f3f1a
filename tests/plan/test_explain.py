"""A plan in words, where the words are more than a line: names that are nearly right, and many that are alike."""

import pytest
import torch
from torch import nn

import hotweights as hw


def test_an_unknown_name_gets_the_first_ten_that_are_like_it():
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(12)))
    plan = hw.trace(model, hw.open(model.state_dict()).manifest)
    with pytest.raises(hw.UnknownName, match=r"known are: 0\.weight, 1\.weight, 10\.weight, .* and 2 more$"):
        plan.explain("weight")


def test_a_tensor_beside_many_others_is_titled_with_their_number():
    flat = torch.zeros(20)
    model = nn.Module()
    model.flat = nn.Parameter(flat)
    for number in range(5):
        setattr(model, f"p{number}", nn.Parameter(flat[4 * number : 4 * number + 4]))
    plan = hw.trace(model, hw.open({"flat": torch.ones(20)}).manifest)
    assert plan.explain("flat").splitlines()[0] == "flat: F32 [20] (shares memory with 5 tensors)"
    assert plan.explain("p1").splitlines() == ["p1: F32 [4] (shares memory with flat)", "  flat <- flat"]


class Tables(nn.Module):
    """A table that no checkpoint carries, one that is a view of the weight, and one that is a view of the first."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 2))
        self.register_buffer("table", torch.arange(4), persistent=False)
        self.register_buffer("part", self.table[:2], persistent=False)
        self.register_buffer("first", self.weight.data[0], persistent=False)


def test_non_persistent_buffers_and_views(tmp_path):
    model = nn.ModuleDict({"layer": Tables()})
    plan = hw.trace(model, hw.open({"layer.weight": torch.ones(4, 2)}).manifest)
    plan.save(tmp_path / "plan")
    for each in (plan, hw.LoadPlan.load(tmp_path / "plan")):
        assert each.explain("layer.table").splitlines() == [
            "layer.table",
            "  is a non-persistent buffer, which no checkpoint carries: it keeps its values, and on meta it is "
            "initialised (init_missing= of hotweights.load)",
        ]
        assert each.explain("layer.part").splitlines()[1] == each.explain("layer.table").splitlines()[1]
        assert each.explain("layer.first").splitlines() == [
            "layer.first",
            "  is a non-persistent buffer in the memory of layer.weight, and shows what that holds",
            "layer.weight: F32 [4, 2]",
            "  all of it <- layer.weight",
        ]
    with pytest.raises(hw.UnknownName, match=r"known are: layer\.table"):
        plan.explain("table")
    hw.load(model, {"layer.weight": torch.ones(4, 2)})
    assert model["layer"].first.tolist() == [1, 1]  # As was said.
    assert model["layer"].table.tolist() == [0, 1, 2, 3]
