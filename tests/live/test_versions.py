"""``_version`` of live tensors: commits and aborts that wrote can be seen by caches, and by autograd."""

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.testing import write_checkpoint

WAYS = ("staged", "journal", False)


class Scaled(nn.Linear):
    """A layer that is processed: its weight is scaled in place, and a packed copy is made."""

    quant_method = None

    def __init__(self):
        super().__init__(2, 2)
        self.kept = [self.weight.data]


def process(layer):
    layer.weight.data.mul_(2)
    layer.packed = layer.weight.data.to(torch.float64)
    layer.seen = layer.packed.data


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(2, 2)
        self.scaled = Scaled()
        self.alias = self.plain.weight.data

    def seen(self):
        return [
            *(self.plain.weight, self.plain.bias, self.alias, self.scaled.weight, self.scaled.kept[0]),
            *(self.scaled.packed, self.scaled.seen),
        ]


def state(value):
    return {name: torch.full_like(tensor, value) for name, tensor in Net().state_dict().items()}


@pytest.fixture(params=["files", "mapping", "iterator"])
def give(request, tmp_path):
    def source(value):
        if request.param == "files":
            write_checkpoint(tmp_path / str(value), state(value))
            return tmp_path / str(value)
        weights = state(value)
        return weights if request.param == "mapping" else hw.from_iterator(weights.items(), hw.open(weights).manifest)

    return source


def loaded(give):
    model = Net()
    live = hw.LiveModel(model, process=process, layers="scaled")
    live.load(give(1.0))
    return model, live


def versions(model):
    return [tensor._version for tensor in model.seen()]


def all_grew(model, before):
    return all(now > was for now, was in zip(versions(model), before, strict=True))


def test_after_the_first_load(give):
    model = Net()
    tensors = [model.plain.weight, model.plain.bias, model.alias]
    before = [tensor._version for tensor in tensors]
    hw.LiveModel(model, process=process, layers="scaled").load(give(1.0))
    assert all(tensor._version > was for tensor, was in zip(tensors, before, strict=True))


@pytest.mark.parametrize("atomic", WAYS)
def test_after_a_commit(give, atomic):
    model, live = loaded(give)
    before = versions(model)
    at_commit = []
    live.on_commit(lambda version: at_commit.append(all_grew(model, before)))
    live.update(give(3.0), atomic=atomic)
    assert all_grew(model, before)
    assert at_commit == [True]  # Hooks and readers see the new ones from the first moment on.
    assert (model.alias == 3).all()
    assert (model.scaled.seen == 6).all()


@pytest.mark.parametrize("atomic", WAYS)
def test_after_an_abort_that_had_to_put_something_back(give, atomic):
    model, live = loaded(give)
    before = versions(model)
    update = live.begin(atomic=atomic)
    update.feed(state(3.0))
    between = versions(model)
    update.abort()
    # Staged wrote nothing that is live, so caches hold.
    assert versions(model) == before if atomic == "staged" else all_grew(model, between)


def test_an_update_of_a_part_leaves_the_versions_of_the_rest(give):
    model, live = loaded(give)
    before = model.plain.weight._version, model.plain.bias._version
    live.update({"plain.bias": torch.ones(2)}, only="plain.bias")
    assert model.plain.weight._version == before[0]
    assert model.plain.bias._version > before[1]
