"""Layers are processed where their values are collected: nothing is copied twice, and nothing changes by that."""

import itertools

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.live import strategy
from hotweights.memory import host
from hotweights.testing import assert_same_bits

REGISTRY = {}


class Layer(nn.Module):
    """Two weights, and what a forward pass computes with; ``kind`` says what processing does."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.first, self.second = (nn.Parameter(torch.zeros(4, 4), requires_grad=False) for _ in range(2))
        self.apply_to = lambda x: x @ self.first + self.second

    def process(self):
        DONE[self.kind](self)


def nothing(layer):
    pass


def in_place(layer):
    layer.first.mul_(2)


def anew(layer):
    layer.first = nn.Parameter(layer.first * 2, requires_grad=False)


def exchanged(layer):
    layer.first, layer.second = layer.second, layer.first


def transposed(layer):
    layer.first = nn.Parameter(layer.first.t(), requires_grad=False)


def of_another(layer):
    layer.first = nn.Parameter(layer.second.t(), requires_grad=False)


def in_a_closure(layer):
    weight, late = layer.first, layer.second.numpy()
    layer.apply_to = lambda x: x @ weight + torch.from_numpy(late)


def in_a_default(layer):
    weight = layer.first.detach()
    layer.apply_to = lambda x, weight=weight: x @ weight


def in_a_registry(layer):
    REGISTRY[layer] = layer.first.detach()
    layer.apply_to = lambda x: x @ REGISTRY[layer]


DONE = {
    done.__name__: done
    for done in (nothing, in_place, anew, exchanged, transposed, of_another, in_a_closure, in_a_default, in_a_registry)
}
HIDDEN = ("in_a_closure", "in_a_default")


class Model(nn.Module):
    def __init__(self, kinds):
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, kinds))

    def forward(self, x):
        for layer in self.layers:
            x = layer.apply_to(x)
        return x


def loaded(kinds, seed, **options):
    model = Model(kinds)
    live = hw.LiveModel(model, process=Layer.process, layers="layers.*", **options)
    live.load(checkpoint(model, seed))
    return model, live


def checkpoint(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(tensor.shape, generator=generator) for name, tensor in model.state_dict().items()}


def same(model, kinds, seed):
    expected, _ = loaded(kinds, seed)
    assert_same_bits(model.state_dict(), expected.state_dict())
    x = torch.ones(1, 4)
    assert torch.equal(model(x), expected(x))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("deferred", [(), "layers.0"])
@pytest.mark.parametrize("kind", DONE)
def test_an_update_is_a_cold_load_and_an_abort_leaves_all_as_it_was(kind, deferred, stream):
    kinds = [kind, "nothing"]
    model, live = loaded(kinds, 1, deferred=deferred)
    for seed in (2, 3, 4):
        tensors = checkpoint(model, seed)
        before, x = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.ones(1, 4)
        said = model(x)
        with live.begin() as update:  # It is prepared, and comes to nothing.
            update.feed(checkpoint(model, seed + 10))
            update.prepare()
            assert_same_bits(model.state_dict(), before)
            if kind != "in_a_registry":  # Nobody knows of it.
                assert torch.equal(model(x), said)
        if stream:
            with live.begin() as update:
                update.feed(reversed(tensors.items()))
                update.commit()
        else:
            live.update(tensors)
        same(model, kinds, seed)
    live.update(checkpoint(model, 5), atomic="journal")
    same(model, kinds, 5)


def test_what_a_registry_refers_to_is_not_written_over():
    model, live = loaded(["in_a_registry"], 1)
    live.update(checkpoint(model, 2))
    held, values = REGISTRY[model.layers[0]], REGISTRY[model.layers[0]].clone()
    live.update(checkpoint(model, 3))
    assert torch.equal(held, values)


def test_a_rollback_brings_the_closures_of_the_version_before():
    for kind in HIDDEN:
        model, live = loaded([kind], 1, keep_previous=True)
        live.update(checkpoint(model, 2))
        live.update(checkpoint(model, 3))
        same(model, [kind], 3)
        live.rollback()
        same(model, [kind], 2)


@pytest.mark.parametrize("kind", ["nothing", "in_place"])
def test_values_that_processing_leaves_in_place_are_copied_once_beside_the_commit(kind, monkeypatch):
    model, live = loaded([kind] * 3, 1)
    live.update(checkpoint(model, 2))
    taken, copied, real = [], [], host.scratch
    monkeypatch.setattr(host, "scratch", lambda *args: (taken.append(args), real(*args))[1])
    monkeypatch.setattr(strategy, "_copy", lambda *args: copied.append(args))
    report = live.update(checkpoint(model, 3))
    assert taken == copied == []
    assert report.peak_scratch_bytes == 0
    same(model, [kind] * 3, 3)


def test_a_layer_group_that_fails_half_way_leaves_all_as_it_was():
    for kind, other in itertools.product(("nothing", "exchanged"), repeat=2):
        model, live = loaded([kind, other], 1)
        live.update(checkpoint(model, 2))
        model.layers[1].kind = "failing"
        with pytest.raises(hw.UpdateAborted, match="failing"):
            live.update(checkpoint(model, 3))
        model.layers[1].kind = other
        same(model, [kind, other], 2)
        live.update(checkpoint(model, 4))
        same(model, [kind, other], 4)


@pytest.mark.parametrize("kind", DONE)
def test_a_torch_that_does_not_count_references(kind, monkeypatch):
    """The function that does is none of its public ones."""
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    kinds = [kind, "nothing"]
    model, live = loaded(kinds, 1)
    for seed in (2, 3):
        live.update(checkpoint(model, seed))
        same(model, kinds, seed)
