"""``_version``: whoever keys a cache by it, and autograd, can see that a load wrote, by whatever way the bytes came."""

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.testing import write_checkpoint


class Net(nn.Module):
    """Tensors in all the places where a model may have them; each has a counter of its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.linear.weight
        self.register_buffer("part", self.linear.weight.data[:2], persistent=False)
        self.register_buffer("table", torch.zeros(3))
        self.register_buffer("derived", torch.zeros(3), persistent=False)
        self.kept = self.linear.bias.data
        self.listed = [self.table.data, {"deep": self.linear.weight.data.view(-1)[5:7]}]
        self.alone = torch.zeros(4)

    def seen(self):
        """Every tensor that sees bytes of the checkpoint."""
        return [
            *(self.linear.weight, self.linear.bias, self.part, self.table),
            *(self.kept, self.listed[0], self.listed[1]["deep"]),
        ]


def state():
    return {
        "linear.weight": torch.ones(4, 4),
        "linear.bias": torch.ones(4),
        "tied.weight": torch.ones(4, 4),
        "table": torch.ones(3),
    }


@pytest.fixture(params=["files", "direct", "mapping", "iterator"])
def source(request, tmp_path):
    if request.param == "mapping":
        return state(), {}
    if request.param == "iterator":
        return hw.from_iterator(state().items(), hw.open(state()).manifest), {}
    write_checkpoint(tmp_path, state())
    return tmp_path, {"io": "direct" if request.param == "direct" else "auto"}


class ByCode(Net):
    """Loading code that no plan can repeat, and that writes past the counters as engines do."""

    def load_weights(self, pairs):
        own = dict(self.named_parameters(remove_duplicate=False)) | dict(self.named_buffers())
        for name, tensor in pairs:
            if float(tensor.sum()) >= 0:
                own[name].data.copy_(tensor)


@pytest.mark.parametrize("kind", [Net, ByCode])
def test_every_tensor_that_sees_what_was_written_has_a_new_version(kind, source):
    model = kind()
    before = [tensor._version for tensor in model.seen()]
    others = [model.derived._version, model.alone._version]
    hw.load(model, source[0], **source[1])
    assert all((tensor == 1).all() for tensor in model.seen())
    assert all(tensor._version > was for tensor, was in zip(model.seen(), before, strict=True))
    assert [model.derived._version, model.alone._version] == others


def test_autograd_notices_that_a_load_came_between_forward_and_backward(source):
    model = Net()
    loss = model.linear(torch.ones(2, 4, requires_grad=True)).sum()
    hw.load(model, source[0], **source[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_load_that_failed_half_way_wrote_too():
    model = nn.Linear(2, 2)
    before = model.weight._version

    def pairs():
        yield "weight", torch.ones(2, 2)
        raise ConnectionError

    with hw.from_iterator(pairs(), hw.open(model).manifest) as source, pytest.raises(ConnectionError):
        hw.load(model, source)
    assert (model.weight == 1).all()
    assert model.weight._version > before


def test_a_load_that_was_refused_wrote_nothing():
    model = nn.Linear(2, 2)
    before = model.weight._version
    with pytest.raises(hw.PlanError):
        hw.load(model, {"weight": torch.ones(2, 2)})
    assert model.weight._version == before


def test_models_of_inference_mode_and_meta_models_are_loaded_as_ever(tmp_path):
    write_checkpoint(tmp_path, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    with torch.inference_mode():
        frozen = nn.Linear(2, 2)
    hw.load(frozen, tmp_path)
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    hw.load(model, tmp_path, device="cpu")
    assert (frozen.weight == 1).all()
    assert (model.weight == 1).all()
