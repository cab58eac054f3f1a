"""The oracle `support/whole.py` sees every change of a model; else the tests that ask it prove nothing."""

import ast
import functools

import pytest
import torch
import whole
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_


class Subclass(nn.Parameter):
    """As engines have them."""


class Kernel:
    """Memory that hangs on a layer by an object, as engines' kernels do."""

    def __init__(self):
        self.packed = torch.zeros(3)
        self.table = {"rows": [torch.zeros(2)], "names": {"a"}}
        self.number = 1

    def run(self):
        return self.packed


def made():
    module = nn.Linear(32, 32)
    quantize_(nn.Sequential(module), Int8WeightOnlyConfig())
    module.register_buffer("scale", torch.ones(2), persistent=False)
    module.kernel, module.pair = Kernel(), (torch.zeros(1), 0)
    module.method, module.part = Kernel().run, functools.partial(torch.add, torch.zeros(4))
    closed = torch.zeros(5)
    module.closure = lambda: closed
    module.bias.loader = {"dim": 0}
    return nn.Sequential(module)


def fill(tensor):
    with torch.no_grad():
        tensor.fill_(7)


VALUES = {
    "a parameter": lambda layer: fill(layer.bias),
    "a buffer": lambda layer: fill(layer.scale),
    "inside a wrapper": lambda layer: fill(layer.weight.scale),
    "an attribute of an object": lambda layer: fill(layer.kernel.packed),
    "in a list in a dict": lambda layer: fill(layer.kernel.table["rows"][0]),
    "in a tuple": lambda layer: fill(layer.pair[0]),
    "of the object of a method": lambda layer: fill(layer.method.__self__.packed),
    "in a partial": lambda layer: fill(layer.part.args[0]),
    "in a closure": lambda layer: fill(layer.closure()),
}
FACTS = {
    "a number": lambda layer: setattr(layer.kernel, "number", 2),
    "a word in a set": lambda layer: layer.kernel.table["names"].add("b"),
    "a flag": lambda layer: layer.eval(),
    "an attribute of a parameter": lambda layer: layer.bias.loader.update(dim=1),
    "requires_grad": lambda layer: layer.bias.requires_grad_(False),
    "the class of a parameter": lambda layer: setattr(layer.bias, "__class__", Subclass),
}
OBJECTS = {
    "an equal container": lambda layer: setattr(layer.kernel, "table", dict(layer.kernel.table)),
    "an equal object": lambda layer: setattr(layer, "kernel", copied(layer.kernel)),
    "an equal tensor": lambda layer: setattr(layer.kernel, "packed", layer.kernel.packed.clone()),
    "a tie that is none any more": lambda layer: setattr(layer, "pair", (torch.zeros(1), 0)),
    "a hook": lambda layer: layer.register_forward_hook(lambda *_: None),
}


def copied(kernel):
    new = Kernel()
    new.__dict__.update(kernel.__dict__)
    return new


@pytest.mark.parametrize("change", VALUES.values(), ids=VALUES)
def test_a_value(change):
    model = made()
    before, everything, facts = whole.values(model), whole.everything(model), whole.plain(model)
    change(model[0])
    assert whole.values(model) != before
    assert whole.everything(model) != everything
    assert whole.plain(model) == facts


@pytest.mark.parametrize("change", FACTS.values(), ids=FACTS)
def test_a_fact(change):
    model = made()
    before = whole.plain(model)
    change(model[0])
    assert whole.plain(model) != before


@pytest.mark.parametrize("change", OBJECTS.values(), ids=OBJECTS)
def test_an_object(change):
    model = made()
    before = whole.everything(model)
    assert whole.everything(model) == before
    change(model[0])
    assert whole.everything(model) != before


def test_an_exchanged_container_or_object_is_another_holder():
    for name in ("an equal container", "an equal object"):
        model = made()
        before = whole.holders(model)
        OBJECTS[name](model[0])
        assert whole.holders(model) != before


def test_it_shares_no_code_with_what_it_judges():
    with open(whole.__file__) as file:
        nodes = list(ast.walk(ast.parse(file.read())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert names
    assert not any(name.startswith("hotweights") for name in names)
