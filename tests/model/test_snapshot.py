"""Snapshot: whatever code does to a model's attributes and their containers is named and undone."""

import pytest
import torch
import whole
from torch import nn

from hotweights.model.snapshot import Snapshot


class Object:
    def __init__(self):
        self.names = ["a"]


class Other(nn.Linear):
    """Another class for the same layer."""


def made():
    layer = nn.Linear(2, 2)
    layer.register_buffer("scale", torch.ones(2))
    layer.table, layer.names, layer.seen, layer.method, layer.empty = {"a": [1]}, ["a", "b"], {1}, Object(), {}
    layer.weight.loader = {"dim": 0}
    return nn.Sequential(layer)


CHANGES = {
    "a new attribute": (lambda layer: setattr(layer, "new", 1), "0.new"),
    "a removed attribute": (lambda layer: delattr(layer, "names"), "0.names"),
    "another parameter": (lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(1))), "0.weight"),
    "a removed buffer": (lambda layer: delattr(layer, "scale"), "0.scale"),
    "a child": (lambda layer: layer.add_module("child", nn.Linear(1, 1)), "0.child"),
    "the class": (lambda layer: setattr(layer, "__class__", Other), "0.__class__"),
    "a key of a dict": (lambda layer: layer.table.update(b=2), "0.table.b"),
    "an item deep inside": (lambda layer: layer.table["a"].append(2), "0.table.a"),
    "the order of a list": (lambda layer: layer.names.reverse(), "0.names"),
    "an item of a set": (lambda layer: layer.seen.add(2), "0.seen"),
    "an object's list": (lambda layer: layer.method.names.clear(), "0.method.names"),
    "an empty container": (lambda layer: layer.empty.update(a=1), "0.empty.a"),
    "an attribute of a parameter": (lambda layer: layer.weight.loader.update(dim=1), "0.weight.loader.dim"),
    "requires_grad": (lambda layer: layer.weight.requires_grad_(False), "0.weight.requires_grad"),
    "a gradient": (lambda layer: setattr(layer.weight, "grad", torch.ones(2, 2)), "0.weight.grad"),
}
OF_STATE = {"another parameter", "a removed buffer", "a child", "the class", "requires_grad", "a gradient"}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named_and_undone(name):
    change, where = CHANGES[name]
    model = made()
    before, snapshot = whole.everything(model), Snapshot(model)
    change(model[0])
    changes = {change.where: change for change in snapshot.put_back()}
    (where,) = (found for found in changes if found.removeprefix("Sequential.") == where)
    assert changes[where].of_state == (name in OF_STATE)
    assert whole.everything(model) == before
    assert not snapshot.put_back()


def test_values_of_tensors_are_no_matter_of_a_snapshot():
    model = made()
    snapshot = Snapshot(model)
    model[0].weight.data.fill_(7)
    assert not snapshot.put_back()
    assert (model[0].weight == 7).all()


def nested(depth):
    """A layer so many modules deep, and its path."""
    leaf = model = made()[0]
    for _ in range(depth):
        model = nn.ModuleDict({"of": model})
    return nn.Sequential(model), leaf, "0." + "of." * depth


@pytest.mark.parametrize("depth", range(13))
def test_a_layer_may_lie_at_any_depth(depth):
    model, layer, path = nested(depth)
    snapshot, weight = Snapshot(model), layer.weight
    layer.weight = nn.Parameter(torch.ones(1))
    layer.method.names.append("b")
    assert {change.where for change in snapshot.put_back()} == {f"{path}weight", f"{path}method.names"}
    assert layer.weight is weight
    assert layer.method.names == ["a"]


@pytest.mark.parametrize("depth", range(13))
def test_parts_that_are_not_registered_are_put_back_too(depth):
    hidden, layer, _ = nested(depth)
    model = nn.Module()
    model.inner = [hidden]
    snapshot, weight = Snapshot(model), layer.weight
    layer.weight = nn.Parameter(torch.ones(1))
    (change,) = snapshot.put_back()
    assert change.of_state
    assert layer.weight is weight
