"""Digests: of values, dtypes and shapes, by name; they say nothing of where a tensor lies."""

import pytest
import torch
from torch import nn

from hotweights.memory.digest import digests
from hotweights.model.digests import digest_of

TENSOR = torch.arange(12.0).view(3, 4)
OTHERS = {
    "a value": TENSOR + torch.eye(3, 4),
    "a sign of nought": torch.where(TENSOR == 0, -0.0, TENSOR),
    "the shape": TENSOR.view(4, 3),
    "the dtype": TENSOR.view(torch.int32),
}


def digest(tensor):
    return digests({"a": tensor}, ["a"])["a"]


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_tensor_has_another_digest(other):
    assert digest(other) != digest(TENSOR)


def test_strides_have_no_say():
    assert digest(TENSOR.t().contiguous().t()) == digest(TENSOR)


def test_a_name_that_is_not_there_has_none():
    assert list(digests({"a": TENSOR}, ["b", "a"])) == ["a"]


def test_the_whole_says_which_name_has_what():
    a, b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    wholes = {
        digest_of(nn.ModuleDict(layers)).whole for layers in ({"a": a, "b": b}, {"a": b, "b": a}, {"a": a, "c": b})
    }
    assert len(wholes) == 3


def test_uninitialised_parameters_have_none():
    assert digest_of(nn.LazyLinear(3)).tensors == {}
