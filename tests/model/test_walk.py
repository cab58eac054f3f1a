"""From a model to its modules, and from any object to the tensors that it leads to."""

import functools
import types

import torch
from torch import nn

from hotweights.model.reachable import reachable
from hotweights.model.walk import DEPTH, LEAVES, MODULE_PRIVATE, modules_of, walk


class Holder:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def method(self):
        """Bound, it leads to its object."""


def paths(value):
    return [path for path, item in walk("x", value, set()) if isinstance(item, torch.Tensor)]


def test_modules_are_those_of_torch_in_its_order():
    shared = nn.Linear(1, 1)
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), shared)
    model.absent = None
    model.register_module("none", None)
    expected = [(f"{name}." if name else "", module) for name, module in model.named_modules(remove_duplicate=False)]
    assert list(modules_of(model)) == expected


def test_tensors_are_found_wherever_objects_lead():
    one, two = torch.zeros(1), torch.zeros(2)

    def closure():
        return one, two

    assert paths({"a": [one], 3: (two,)}) == ["x['a'][0]", "x[3][0]"]
    assert paths(functools.partial(print, one, key=two)) == ["x.args[0]", "x.keywords['key']"]
    assert paths(closure) == ["x.__closure__[0]", "x.__closure__[1]"]
    assert paths(Holder(tensor=one).method) == ["x.__self__.tensor"]
    hidden = nn.Linear(1, 1)
    hidden.extra = one
    assert paths(Holder(inner=hidden)) == ["x.inner.weight", "x.inner.bias", "x.inner.extra"]


def test_what_leads_nowhere_is_not_entered():
    assert paths([1, "a", None, torch.float32, torch.Size([2]), types, int]) == []
    nested = torch.zeros(1)
    for _ in range(DEPTH):
        nested = [nested]
    assert paths(nested)
    assert not paths([nested])
    circle = []
    circle.append(circle)
    assert paths(circle) == []


def test_the_lists_are_what_they_say():
    assert {"_parameters", "_buffers", "_modules", "training"} <= MODULE_PRIVATE
    assert vars(nn.Linear(1, 1)).keys() - MODULE_PRIVATE == {"in_features", "out_features"}
    assert not any(issubclass(kind, (torch.Tensor, nn.Module, dict, list, set)) for kind in LEAVES)


def test_a_tensor_has_the_first_of_its_paths():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1))
    model.alias = [model.weight]
    model.register_buffer("later", torch.zeros(1), persistent=False)
    model.register_buffer("state", torch.zeros(1))
    model.other = {"t": torch.zeros(1)}
    assert list(reachable(model)) == ["weight", "state", "later", "other['t']"]
