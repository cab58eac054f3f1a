"""Reachable tensors: every place in which a model may keep one, each tensor once."""

import functools

import pytest
import torch
from torch import nn

from hotweights.model.reachable import reachable


class Object:
    def __init__(self, tensor):
        self.tensor = tensor

    def method(self):
        return self.tensor


def closure(tensor):
    return lambda: tensor


PLACES = {
    "an attribute": (lambda tensor: tensor, "kept"),
    "a list": (lambda tensor: [0, tensor], "kept[1]"),
    "a dict": (lambda tensor: {"key": tensor}, "kept['key']"),
    "a set": (lambda tensor: {tensor}, "kept[0]"),
    "an object": (Object, "kept.tensor"),
    "a bound method": (lambda tensor: Object(tensor).method, "kept.__self__.tensor"),
    "a partial": (lambda tensor: functools.partial(torch.add, tensor), "kept.args[0]"),
    "a closure": (closure, "kept.__closure__[0]"),
}


@pytest.mark.parametrize(("keep", "path"), PLACES.values(), ids=PLACES)
def test_a_tensor_is_reached_in(keep, path):
    model, tensor = nn.Sequential(nn.Module()), torch.ones(2)
    model[0].kept = keep(tensor)
    found = reachable(model)
    assert list(found) == [f"0.{path}"]
    assert found[f"0.{path}"] is tensor


def test_state_comes_before_buffers_that_view_it():
    model = nn.Linear(2, 2)
    model.register_buffer("row", model.weight.data[0], persistent=False)
    model.register_buffer("steps", torch.zeros(()))
    model.again = [model.weight]
    assert list(reachable(model)) == ["weight", "bias", "steps", "row"]


def test_what_leads_back_to_itself_ends():
    model = nn.Module()
    model.loop = loop = []
    loop.append(loop)
    model.itself = [model]
    assert reachable(model) == {}


@pytest.mark.parametrize("depth", range(13))
def test_tensors_of_layers_are_reached_at_any_depth(depth):
    """Also where an attribute of another part leads there, through whatever lies between."""
    leaf = inner = nn.Module()
    leaf.kept, leaf.table = [[torch.ones(2)]], {"a": {"b": torch.ones(2)}}
    for _ in range(depth):
        inner = nn.ModuleDict({"of": inner})
    model = nn.ModuleDict({"first": nn.Module(), "inner": inner})
    model["first"].others = [inner]
    path = "inner." + "of." * depth
    assert len(reachable(model)) == 2
    assert list(reachable(model)) == [f"{path}kept[0][0]", f"{path}table['a']['b']"]


@pytest.mark.parametrize("depth", range(13))
def test_tensors_of_parts_that_are_not_registered_are_reached_at_any_depth(depth):
    leaf = inner = nn.Linear(2, 2)
    for _ in range(depth):
        inner = nn.Sequential(inner)
    model = nn.Module()
    model.inner = [inner]
    assert {id(tensor) for tensor in reachable(model).values()} == {id(leaf.weight), id(leaf.bias)}
