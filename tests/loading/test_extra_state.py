"""Extra state that is a tensor is handed to its module, as ``load_state_dict`` does; in live updates all or nothing."""

import pickle

import pytest
import torch
import whole
from safetensors.torch import save_file
from torch import nn

import hotweights as hw


class Keeper(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("amax", torch.zeros(3), persistent=False)
        self.seen = None


class Copies(Keeper):
    """As layers of fp8 do it: what the state dict has as extra state lies in a buffer."""

    def get_extra_state(self):
        return self.amax.clone()

    def set_extra_state(self, state):
        self.amax.copy_(state)

    def hold(self, number):
        self.amax.fill_(number)


class Rebinds(Copies):
    def set_extra_state(self, state):
        self.amax = state.clone()


class Keeps(Keeper):
    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state

    def hold(self, number):
        self.seen = torch.full((3,), float(number))


class Reads(Keeper):
    def get_extra_state(self):
        return torch.tensor(self.seen)

    def set_extra_state(self, state):
        self.seen = float(state)

    def hold(self, number):
        self.seen = float(number)


class Unpickles(Keeper):
    def get_extra_state(self):
        return torch.frombuffer(bytearray(pickle.dumps(self.seen)), dtype=torch.uint8)

    def set_extra_state(self, state):
        self.seen = pickle.loads(state.numpy().tobytes())

    def hold(self, number):
        self.seen = {"step": number}


@pytest.fixture(params=[Copies, Rebinds, Keeps, Reads, Unpickles])
def made(request):
    def make(number):
        model = nn.Sequential(nn.Linear(2, 2), request.param())
        for parameter in model.parameters():
            nn.init.constant_(parameter, number)
        model[1].hold(number)
        return model

    return make


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def holds(model):
    """What it computes with, and what it would save."""
    layer = model[1]
    seen = layer.seen.tolist() if isinstance(layer.seen, torch.Tensor) else layer.seen
    return {name: tensor.tolist() for name, tensor in state(model).items()}, layer.amax.tolist(), seen


@pytest.mark.parametrize("how", ["mapping", "module", "file", "iterator"])
def test_it_is_loaded_as_torch_does(made, how, tmp_path):
    source, model, torchs = made(1), made(0), made(0)
    given = {"mapping": state(source), "module": source, "iterator": hw.from_iterator(iter(state(source).items()))}
    save_file(state(source), tmp_path / "model.safetensors")
    hw.load(model, given.get(how, tmp_path))
    torchs.load_state_dict(state(source))
    assert holds(model) == holds(torchs) == holds(source)


@pytest.mark.parametrize("atomic", ["staged", "journal"])
def test_updates_take_it_and_an_abort_puts_it_back(made, atomic):
    model = made(0)
    live = hw.LiveModel(model, atomic=atomic)
    live.load(made(1))
    live.update(made(2))
    assert holds(model) == holds(made(2))
    before = whole.everything(model)
    with live.begin() as update:
        update.feed(state(made(3)))
        update.prepare()
    assert whole.everything(model) == before
    assert holds(model) == holds(made(2))
    with live.begin() as update:
        update.feed({name: tensor for name, tensor in state(made(3)).items() if name != "0.bias"})
        with pytest.raises(hw.UpdateAborted):
            update.commit()
    assert holds(model) == holds(made(2))
    live.update(made(3))
    assert holds(model) == holds(made(3))


def test_a_source_without_it_is_refused_unless_that_is_allowed(made):
    model, source = made(0), state(made(1))
    del source["1._extra_state"]
    before = holds(model)
    with pytest.raises(hw.PlanError, match=r"1\._extra_state: missing; \w+ keeps extra state; allow_missing="):
        hw.load(model, source)
    assert holds(model) == before
    hw.load(model, source, allow_missing="1._extra_state")
    assert holds(model)[1:] == before[1:]
    assert not torch.equal(model[1].weight, torch.zeros(2, 2))


def test_extra_state_that_no_module_keeps_is_unexpected():
    model = nn.Sequential(nn.Linear(2, 2), Copies())
    more = {**state(model), "0._extra_state": torch.ones(1), "9.weight": torch.ones(1)}
    with pytest.raises(hw.PlanError) as error:
        hw.load(model, more)
    assert error.value.problems == (
        "0._extra_state: unexpected; the model has no such name",
        "9.weight: unexpected; the model has no such name",
    )
    hw.load(model, more, allow_unexpected=["0._extra_state", "9.*"])


def test_extra_state_that_is_no_tensor_is_refused():
    model = nn.Sequential(Unpickles())
    with pytest.raises(hw.UsageError, match=r"'0\._extra_state' is a dict"):
        hw.load(model, {**state(model), "0._extra_state": {"step": 1}})
