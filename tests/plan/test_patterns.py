"""Patterns: a string is a shell pattern over the whole name."""

import re

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.plan.patterns import matches

NAMES = ["weight", "0.weight", "0.weight_scale", "experts[0].weight", "10.weight"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("weight", ["weight"]),  # and not all that ends so
        ("0.weight", ["0.weight"]),
        ("", []),
        ((), []),
        ("*.weight", ["0.weight", "experts[0].weight", "10.weight"]),
        ("0.*", ["0.weight", "0.weight_scale"]),
        ("experts[0].weight", ["experts[0].weight"]),
        (re.compile("weight"), NAMES),
        (["weight", re.compile("^1")], ["weight", "10.weight"]),
    ],
)
def test_what_matches(patterns, expected):
    assert [name for name in NAMES if matches(patterns)(name)] == expected


def test_what_is_allowed_is_what_was_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tensors = {name: torch.ones_like(one) for name, one in model.state_dict().items()}
    del tensors["1.weight"]
    with pytest.raises(hw.PlanError, match=r"1\.weight: missing"):
        hw.load(model, tensors, allow_missing="weight")
