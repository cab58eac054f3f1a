"""What went wrong in the field when models were reloaded: first seen to bite a naive reload, then not to bite ours."""

import copy
import sys

import pytest
import torch
from torch import nn

import hotweights as hw

WAYS = ("journal", "staged", False)


def parameter(*shape):
    return nn.Parameter(torch.zeros(shape), requires_grad=False)


class Mixer(nn.Module):
    """Three parameters of one size; one is loaded by a copy, and then transformed in place."""

    def __init__(self):
        super().__init__()
        self.A, self.D, self.dt_bias = parameter(4), parameter(4), parameter(4)
        self.A.weight_loader = self.composed

    @staticmethod
    def plain(param, loaded):
        param.data.copy_(loaded)

    def composed(self, param, loaded):
        self.plain(param, loaded)
        self.plain(param, -torch.exp(param.data))

    def load_weights(self, pairs):
        for name, loaded in pairs:
            param = getattr(self, name)
            getattr(param, "weight_loader", self.plain)(param, loaded)


def mixer_weights(value):
    return {name: torch.full((4,), float(value)) for name in ("A", "D", "dt_bias")}


class CountsElements:
    """Naive: a layer is complete when as many elements were written as it has; what comes later is dropped."""

    def __init__(self, model):
        self.model, self.left = model, sum(one.numel() for one in model.parameters())
        plain = model.plain
        model.plain = lambda param, loaded: self.counted(plain, param, loaded)

    def counted(self, plain, param, loaded):
        if self.left > 0:
            plain(param, loaded)
        self.left -= param.numel()


@pytest.mark.parametrize("atomic", WAYS)
def test_a_composed_loader_is_not_counted_twice(atomic):
    naive = Mixer()
    CountsElements(naive)
    naive.load_weights(mixer_weights(1).items())
    assert not naive.dt_bias.any(), "the last parameter was dropped, in silence"

    model = Mixer()
    live = hw.LiveModel(model, atomic=atomic, process=lambda layer: None)
    live.load(mixer_weights(0))
    for order in (("A", "D", "dt_bias"), ("dt_bias", "A", "D"), ("D", "dt_bias", "A")):
        with live.begin() as update:
            update.feed((name, mixer_weights(1)[name]) for name in order)
            update.commit()
        assert torch.equal(model.A, -torch.exp(torch.ones(4)))
        assert torch.equal(model.D, torch.ones(4))
        assert torch.equal(model.dt_bias, torch.ones(4))


class Attention(nn.Module):
    """Its scale follows from another layer's weight."""

    def __init__(self, projection):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.0), requires_grad=False)
        object.__setattr__(self, "projection", projection)  # seen, not owned


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        projection = nn.Linear(2, 2, bias=False).requires_grad_(False)
        self.attention = Attention(projection)  # comes before what it reads
        self.projection = projection


def process(layer):
    if isinstance(layer, Attention):
        layer.scale = nn.Parameter(layer.projection.weight.max() * layer.scale, requires_grad=False)
    elif isinstance(layer, nn.Linear):
        layer.weight = nn.Parameter(layer.weight * 10, requires_grad=False)


def block_weights(value):
    return {"attention.scale": torch.tensor(2.0), "projection.weight": torch.full((2, 2), float(value))}


@pytest.mark.parametrize("atomic", WAYS)
def test_a_layer_that_reads_others_comes_last(atomic):
    naive = Block()
    naive.load_state_dict(block_weights(1))
    for layer in naive.modules():  # in the order of the modules
        process(layer)
    assert naive.attention.scale == 2, "made from the projection as it was before it was processed"

    model = Block()
    live = hw.LiveModel(model, process=process, deferred="attention", atomic=atomic)
    live.load(block_weights(1))
    assert model.attention.scale == 20
    for value in (3, 1, 5):
        live.update(block_weights(value))
        assert model.attention.scale == 20 * value


class Bypassing(nn.Module):
    """Its loading code writes through ``.data``, past every hook on parameters."""

    def __init__(self):
        super().__init__()
        self.weight = parameter(4)

    def load_weights(self, pairs):
        for _, loaded in pairs:
            self.weight.data.copy_(loaded)


@pytest.mark.parametrize("atomic", WAYS)
def test_writes_past_the_loader_are_seen(atomic):
    naive = Bypassing()
    live_weight, naive.weight = naive.weight, nn.Parameter(naive.weight.to("meta"), requires_grad=False)
    naive.load_weights([("weight", torch.ones(4))])  # A reload that only watches weight_loader: nothing happens here.
    naive.weight = live_weight
    assert not naive.weight.any(), "lost, and success reported"

    model = Bypassing()
    live = hw.LiveModel(model, atomic=atomic, process=lambda layer: None)
    live.load({"weight": torch.zeros(4)})
    address = model.weight.data_ptr()
    live.update({"weight": torch.ones(4)})
    assert torch.equal(model.weight, torch.ones(4))
    assert model.weight.data_ptr() == address


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight
        self.requires_grad_(False)


@pytest.mark.parametrize("processed", [(), ("head",), ("embed",), ("embed", "head")])
@pytest.mark.parametrize("atomic", WAYS)
def test_tied_weights_stay_tied(atomic, processed):
    naive = Tied()
    naive.head.weight = nn.Parameter(torch.full((3, 2), torch.nan), requires_grad=False)  # each layer made anew
    naive.embed.weight.copy_(torch.ones(3, 2))
    assert naive.head.weight.isnan().all(), "the tie is gone: the head holds what its new memory held"

    model = Tied()
    names = {id(model.embed): "embed", id(model.head): "head"}

    def scale(layer):
        if names.get(id(layer)) in processed:
            layer.weight.data.mul_(2)

    live = hw.LiveModel(model, process=scale, atomic=atomic)
    live.load({"embed.weight": torch.ones(3, 2)})
    for value in (2.0, 3.0):
        live.update({"embed.weight": torch.full((3, 2), value)})
        assert model.head.weight is model.embed.weight
        assert torch.equal(model.embed.weight, torch.full((3, 2), value * 2 ** len(processed)))


class Deriving(nn.Module):
    """Keeps what follows from its weight where nobody looks: a copy, made when it is first needed, and a view."""

    def __init__(self):
        super().__init__()
        self.weight, self.derived = parameter(2, 2), None
        self.row = self.weight.data[0]

    def forward(self, x):
        if self.derived is None:
            self.derived = self.weight.t().contiguous()
        return x @ self.derived + self.row

    def refresh(self, version):
        self.derived.copy_(self.weight.t())


@pytest.mark.parametrize("processed", [None, lambda layer: None])
@pytest.mark.parametrize("atomic", WAYS)
def test_a_hook_refreshes_what_was_derived(atomic, processed):
    x, new = torch.ones(1, 2), {"weight": torch.full((2, 2), 3.0)}
    naive = Deriving()
    naive(x)
    naive.load_state_dict(new)
    assert not torch.equal(naive(x), torch.full((1, 2), 9.0)), "the derived copy is the old one, and no tensor shows it"

    model = Deriving()
    live = hw.LiveModel(model, process=processed, atomic=atomic)
    live.load({"weight": torch.ones(2, 2)})
    assert torch.equal(model(x), torch.full((1, 2), 3.0))
    live.on_commit(model.refresh)
    address = model.derived.data_ptr()
    live.update(new)
    assert torch.equal(model(x), torch.full((1, 2), 9.0))
    assert model.derived.data_ptr() == address
    assert model.row.data_ptr() == model.weight.data_ptr()  # A view needs no hook.
    with pytest.raises(hw.UpdateAborted):
        live.update({"weight": torch.zeros(1)})
    assert torch.equal(model(x), torch.full((1, 2), 9.0))


class Stack(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False).requires_grad_(False) for _ in range(layers))


def stack_weights(layers, value):
    return {f"layers.{number}.weight": torch.full((2, 2), float(value + number)) for number in range(layers)}


@pytest.mark.parametrize("atomic", WAYS)
def test_the_models_own_tensors_fed_in_another_order(atomic):
    naive = Stack(2)
    naive.load_state_dict(stack_weights(2, 1))
    ours = naive.state_dict()
    swapped = {"layers.0.weight": ours["layers.1.weight"], "layers.1.weight": ours["layers.0.weight"]}
    for name, tensor in swapped.items():
        naive.get_parameter(name).copy_(tensor)
    assert torch.equal(*naive.parameters()), "the second was read after the first was written"

    model = Stack(2)
    live = hw.LiveModel(model, atomic=atomic)
    live.load(stack_weights(2, 1), version="N")
    ours, digest = model.state_dict(), live.digest()
    swapped = {"layers.0.weight": ours["layers.1.weight"], "layers.1.weight": ours["layers.0.weight"]}
    if atomic != "staged":
        with live.begin() as update, pytest.raises(hw.UpdateAborted, match="own memory"):
            update.feed(swapped)
        assert (live.state, live.digest()) == (hw.State.SERVING, digest)
    else:
        with live.begin() as update:
            update.feed(swapped)
            update.commit()
        assert [one[0, 0].item() for one in model.parameters()] == [2, 1]
    live.update(stack_weights(2, 1))
    assert live.digest() == digest


def work_for(layers, feed, monkeypatch):
    """How often tensors and places of the model are looked at in one update of so many layers."""
    model = Stack(layers)
    live = hw.LiveModel(model, process=lambda layer: None)
    live.load(stack_weights(layers, 0))
    count = [0]
    for where, name in (("hotweights.memory.extents", "has_bytes"), ("hotweights.live.processing", "places")):
        found = getattr(sys.modules[where], name)

        def counted(*args, found=found):
            result = found(*args)
            count[0] += 1 if isinstance(result, bool) else len(result := list(result))
            return result

        monkeypatch.setattr(f"{where}.{name}", counted)
    feed(live, stack_weights(layers, 1))
    monkeypatch.undo()
    return count[0]


def pushed(live, weights):
    with live.begin() as update:
        update.feed(weights)
        update.commit()


@pytest.mark.parametrize("feed", [lambda live, weights: live.update(weights), pushed])
def test_the_work_grows_with_the_layers_and_not_with_their_square(feed, monkeypatch):
    assert work_for(40, feed, monkeypatch) <= 2 * work_for(20, feed, monkeypatch) + 10


def test_a_live_model_is_not_copied():
    with pytest.raises(hw.UsageError, match="bound to addresses"):
        copy.deepcopy(hw.LiveModel(Stack(1)))
