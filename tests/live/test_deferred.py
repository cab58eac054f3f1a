"""Deferred layers: they see version M of all that was made before them, and the model is walked once for them all."""

from collections import Counter

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.live import strategy
from hotweights.testing import assert_same_bits

ATOMIC = ("staged", "journal", False)


class Reader(nn.Module):
    """Made of its own weight, of a layer that is not deferred, and of the reader and the window before it."""

    def __init__(self, linear, before):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.register_buffer("total", torch.zeros(4), persistent=False)
        self.others = [linear, *before]  # A list: none of them is its child.

    def process(self):
        linear, *before = self.others
        seen = [linear.weight.sum(), *(tensor for other in before for tensor in other.shown())]
        self.total = self.weight.detach() + sum(seen)
        with torch.no_grad():
            self.weight.mul_(2)

    def shown(self):
        return self.total, self.weight.detach()


class Window(nn.Module):
    """No layer; it has the weight of a reader as a plain attribute, and in a tuple."""

    def __init__(self, reader):
        super().__init__()
        self.__dict__["alias"], self.several = reader.weight, (reader.weight,)

    def shown(self):
        return self.alias.detach(), self.several[0].detach()


class Model(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(depth))
        self.readers, self.windows = nn.ModuleList(), nn.ModuleList()
        for linear in self.layers:
            before = [self.readers[-1], self.windows[-1]] if len(self.readers) else []
            self.readers.append(Reader(linear, before))
            self.windows.append(Window(self.readers[-1]))


def process(layer):
    if isinstance(layer, Reader):
        layer.process()
    else:
        layer.weight = nn.Parameter(layer.weight.detach() * 3)


def loaded(depth, seed, **options):
    model = Model(depth)
    layers = ["layers.*", "readers.*"]
    live = hw.LiveModel(model, process=process, layers=layers, deferred="readers.*", **options)
    live.load(checkpoint(model, seed))
    return model, live


def checkpoint(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(tensor.shape, generator=generator) for name, tensor in model.state_dict().items()}


def held(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def places(model):
    return {name: (id(tensor), tensor.data_ptr()) for name, tensor in held(model).items()}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("atomic", ATOMIC)
def test_they_see_what_was_made_before_them_also_where_others_hold_it(atomic, stream):
    model, live = loaded(3, 1, atomic=atomic)
    objects = places(model)
    for seed in (2, 3):
        tensors = checkpoint(model, seed)
        if stream:
            with live.begin() as update:
                update.feed(reversed(tensors.items()))
                update.commit()
        else:
            live.update(tensors)
        expected, _ = loaded(3, seed)
        assert_same_bits(held(model), held(expected))
        assert places(model) == objects
        for reader, window in zip(model.readers, model.windows, strict=True):
            assert window.alias is window.several[0] is reader.weight


def test_a_failure_among_them_leaves_all_as_it_was():
    model, live = loaded(3, 1)
    before = {name: tensor.detach().clone() for name, tensor in held(model).items()}
    objects = places(model)
    model.readers[2].process = lambda: 1 / 0
    with pytest.raises(hw.UpdateAborted, match="division"):
        live.update(checkpoint(model, 2))
    assert_same_bits(held(model), before)
    assert places(model) == objects
    assert all(window.alias is reader.weight for reader, window in zip(model.readers, model.windows, strict=True))


def test_the_work_grows_with_the_depth_and_not_with_its_square(monkeypatch):
    counts = Counter()

    def counting(owner, name):
        real = getattr(owner, name)

        def counted(*args, **options):
            counts[name] += 1
            return real(*args, **options)

        monkeypatch.setattr(owner, name, counted)

    def counts_of(depth):
        model, live = loaded(depth, 1)
        counts.clear()
        live.update(checkpoint(model, 2))
        return dict(counts)

    counting(strategy, "contents")  # modules whose tensors are looked at
    counting(strategy, "put")
    counting(strategy.Staged, "_value")  # copies of tensors, on a device
    counting(strategy, "modules_held")  # walks over the model
    few, many = counts_of(8), counts_of(32)
    assert few["modules_held"] == many["modules_held"] == 1
    assert few.keys() == many.keys()
    assert all(many[name] <= 4 * few[name] for name in many)
