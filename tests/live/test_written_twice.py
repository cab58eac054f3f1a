"""Loading code that writes one tensor, of one name, from two sources. As the code does, the last one wins."""

import pytest
import torch
from torch import nn

import hotweights as hw


class Fused(nn.Module):
    """As compressed-tensors: each shard brings the shape of its weight, and all of them are put into one tensor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 2), requires_grad=False)
        self.weight_shape = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
        self.scales = nn.Parameter(torch.zeros(2), requires_grad=False)

    def load_weights(self, pairs):
        for name, tensor in pairs:
            shard, key = name.split(".")
            into = getattr(self, key).data
            if key == "weight":
                into = into.narrow(0, 2 * "qk".index(shard), 2)
            if key == "scales":
                if shard == "k":
                    into[1:].copy_(tensor)
                into = into[:1]
            into.copy_(tensor)


def checkpoint(seed, order="qk"):
    torch.manual_seed(seed)
    tensors = {}
    for shard in order:
        number = seed + "qk".index(shard)
        tensors[f"{shard}.weight"] = torch.rand(2, 2)
        tensors[f"{shard}.weight_shape"] = torch.tensor([number, 2])
        tensors[f"{shard}.scales"] = torch.tensor([float(number)])
    return tensors


def cold(tensors):
    model = Fused()
    model.load_weights(tensors.items())
    return model.state_dict()


def same(model, tensors):
    expected = cold(tensors)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("order", ["qk", "kq"])
def test_a_load(order):
    tensors = checkpoint(1, order)
    for source in (tensors, hw.from_iterator(reversed(tensors.items()), manifest=hw.open(tensors).manifest)):
        model = Fused()
        hw.load(model, source, verify="off")
        same(model, tensors)
    model = Fused()
    hw.load(model, tensors, verify="loader")


@pytest.mark.parametrize("process", [None, lambda layer: None])
@pytest.mark.parametrize("atomic", ["staged", "journal", False])
def test_updates(atomic, process):
    model = Fused()
    live = hw.LiveModel(model, atomic=atomic, process=process)
    live.load(checkpoint(1))
    live.update(checkpoint(2))
    same(model, checkpoint(2))
    with live.begin() as update:
        update.feed(reversed(checkpoint(3).items()))
        update.commit()
    same(model, checkpoint(3))


def test_two_names_of_one_tensor_are_compared_still():
    class Tied(Fused):
        def __init__(self):
            super().__init__()
            self.other = self.weight_shape

    with pytest.raises(hw.TiedWeightsDiffer, match="are one tensor in the model"):
        hw.load(Tied(), checkpoint(1))
