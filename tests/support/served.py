"""A live model that is served: a processed layer, tied weights, a view and a counter; and all that it holds."""

import torch
from torch import nn

import hotweights as hw
from hotweights.testing import assert_same_bits, bits

WAYS = ("staged", "journal")


class Doubled(nn.Linear):
    """A layer whose kernel has another layout, a scale that is no tensor, and a table in a container."""

    def forward(self, x):
        return x @ self.table["packed"] * self.factor


def process(layer):
    layer.factor = float(layer.weight.abs().max())
    layer.table = {"packed": (layer.weight / layer.factor).t().contiguous()}
    layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)


class Model(nn.Module):
    """A processed layer, tied weights, a buffer that views a weight, and a counter that forward writes."""

    def __init__(self):
        super().__init__()
        self.processed = Doubled(4, 4, bias=False)
        self.head, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.head.weight
        self.register_buffer("view", self.head.weight.detach().view(-1)[2:7], persistent=False)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        return self.tied(self.head(self.processed(x))) + self.view.sum()


def version_of(number):
    ones = {name: torch.full_like(tensor, float(number)) for name, tensor in Model().state_dict().items()}
    return {name: tensor for name, tensor in ones.items() if name != "tied.weight"}


def live_model(atomic="staged", **options):
    live = hw.LiveModel(Model(), process=process, layers="processed", atomic=atomic, **options)
    live.load(version_of(1), version=1, allow_missing="tied.weight")
    return live


def state(live):
    """All bytes, all addresses and what is no tensor."""
    layer, model = live.model.processed, live.model
    tensors = {**model.state_dict(), "view": model.view, "packed": layer.table["packed"]}
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    return {name: bits(tensor) for name, tensor in tensors.items()}, addresses, layer.factor


def same(one, other):
    assert_same_bits(one[0], other[0])
    assert one[1:] == other[1:]


def output(model):
    with torch.no_grad():
        return model(torch.ones(1, 4)).flatten()[0].item()


def runs(model):
    """A check that lets every version pass for which a forward pass runs."""
    output(model)
    return True


def bias(model):
    return model.head.bias[0].item()
