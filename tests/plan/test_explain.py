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
