"""Meta tensors made real: all that they were besides their memory, they still are."""

import torch
from torch import nn

from hotweights.model.materialise import materialise
from hotweights.model.places import places


class Sharded(nn.Parameter):
    """As engines have them: a class of parameters with attributes."""


def made(model, *names):
    return materialise(places(model), names, torch.device("cpu"))


def test_only_the_named_are_made_real_and_can_be_put_back():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    before = dict(model.named_parameters())
    replaced = made(model, "weight")
    assert not model.weight.is_meta
    assert model.bias.is_meta
    for place, old in replaced:
        place.put(old)
    assert all(model.get_parameter(name) is tensor for name, tensor in before.items())


def test_class_attributes_and_requires_grad_stay():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    model.weight = Sharded(torch.empty(2, 2, device="meta"), requires_grad=False)
    model.weight.loader = "its own"
    made(model, "weight")
    assert type(model.weight) is Sharded
    assert model.weight.loader == "its own"
    assert not model.weight.requires_grad


def test_tied_tensors_are_one_under_all_names():
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    made(model, "a.weight")
    assert model["b"].weight is model["a"].weight
    assert not model["a"].weight.is_meta


def test_views_share_memory_as_before():
    with torch.device("meta"):
        model = nn.Linear(3, 2, bias=False)
    model.register_buffer("column", model.weight.data[:, 1])
    made(model, "weight")
    model.weight.data.copy_(torch.arange(6.0).view(2, 3))
    assert model.column.tolist() == [1, 4]
    assert model.column.stride() == (3,)


def test_real_tensors_are_left_alone():
    model = nn.Linear(2, 2)
    weight = model.weight
    assert made(model, "weight", "bias") == []
    assert model.weight is weight
