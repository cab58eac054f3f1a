"""Layers: a small model whose version is a number that each of its tensors is full of."""

import torch
from torch import nn

import hotweights as hw

WAYS = ("staged", "journal", False)


class Layers(nn.Module):
    """A processed layer, plain ones, and a buffer."""

    def __init__(self):
        super().__init__()
        self.processed, self.plain = nn.Linear(8, 8, bias=False), nn.Linear(64, 40)
        self.register_buffer("scale", torch.zeros(3))


def process(layer):
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous(), requires_grad=False)


_SHAPES = {name: tensor.shape for name, tensor in Layers().state_dict().items()}


def version_of(number):
    return {name: torch.full(shape, float(number)) for name, shape in _SHAPES.items()}


def streamed(number):
    tensors = version_of(number)
    return hw.from_iterator(iter(tensors.items()), hw.open(tensors).manifest)


def live_model(atomic, **options):
    return hw.LiveModel(Layers(), process=process, layers="processed", atomic=atomic, **options)


def numbers_in(model):
    """The numbers of all versions of which the model holds something: one, if it is whole."""
    return set(torch.cat([tensor.flatten() for tensor in model.state_dict().values()]).tolist())


def fault_of(live):
    """What is wrong with a live model that nobody updates; empty if it is one version by name and by bytes, or torn."""
    if live.state is hw.State.TORN:
        return ""
    found = numbers_in(live.model)
    if live.state is hw.State.SERVING and found == {float(live.version)}:
        return ""
    return f"{live!r} holds {sorted(found)[:4]}"
