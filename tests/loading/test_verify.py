"""``verify="loader"``: the model's own code proves the plan, layer by layer."""

import sys

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.testing import assert_same_bits, write_checkpoint


class Fused(nn.Module):
    """Two layers, each with a fused weight, a norm, and a scale that its weight waits for."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ParameterDict({"qk": torch.zeros(8, 4), "norm": torch.zeros(4)}) for _ in range(2)
        )
        self.calls = 0

    def load_weights(self, weights):
        self.calls += 1
        waiting = {}
        for name, tensor in weights:
            _, number, what = name.split(".")
            layer = self.layers[int(number)]
            if what == "norm":
                layer.norm.data.copy_(tensor)
            elif what == "k" or what == "scale":
                waiting[number, what] = tensor
                if {(number, "k"), (number, "scale")} <= waiting.keys():
                    layer.qk.data[4:].copy_(waiting[number, "k"] * waiting[number, "scale"])
            else:
                layer.qk.data[:4].copy_(tensor)


@pytest.fixture
def checkpoint(tmp_path):
    shapes = {"q": (4, 4), "k": (4, 4), "scale": (), "norm": (4,)}
    state = {f"layers.{number}.{what}": torch.randn(shape) for number in range(2) for what, shape in shapes.items()}
    return write_checkpoint(tmp_path, state), state


def test_a_right_plan_is_proven_and_leaves_no_trace(checkpoint):
    directory, state = checkpoint
    for source in (directory, state):
        ours, theirs = Fused(), Fused()
        addresses = {name: tensor.data_ptr() for name, tensor in ours.state_dict().items()}
        report = hw.load(ours, source, verify="loader")
        theirs.load_weights(state.items())
        assert_same_bits(ours.state_dict(), theirs.state_dict())
        assert {name: tensor.data_ptr() for name, tensor in ours.state_dict().items()} == addresses
        assert ours.calls == 0
        assert report.planned == 8
        assert report.proven == 4
        assert "    proven  4 tensors of the model, bit for bit, by the model's own loading code" in str(report)
        assert report.side_effects == ("Fused.calls",)


def test_a_wrong_one_is_found_and_put_right(checkpoint, monkeypatch):
    directory, state = checkpoint
    module = sys.modules["hotweights.loading.load"]
    execute = module.execute

    def lying(plan, source, destinations, done, **options):
        kept = execute(plan, source, destinations, done, **options)
        destinations["layers.1.qk"].data[7, 3] += 1
        return kept

    monkeypatch.setattr(module, "execute", lying)
    ours, theirs = Fused(), Fused()
    hw.load(ours, directory)  # without the proof nobody notices
    with pytest.raises(hw.PlanDiffers) as caught:
        hw.load(ours, directory, verify="loader")
    assert caught.value.problems == ("layers.1.qk",)
    theirs.load_weights(state.items())
    assert_same_bits(ours.state_dict(), theirs.state_dict())


def test_by_name_and_strided(tmp_path):
    ours = nn.Linear(4, 4)
    ours.weight = nn.Parameter(torch.empty(4, 4).t())
    state = {"weight": torch.randn(4, 4), "bias": torch.randn(4)}
    hw.load(ours, state, verify="loader")
    assert_same_bits(ours.state_dict(), state)


def test_a_stream_cannot_be_asked_twice():
    class Stream:
        def __init__(self, source):
            self.manifest, self.leases, self.tensors, self.close = (
                source.manifest,
                source.leases,
                source.tensors,
                source.close,
            )

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.close()

    with hw.open(nn.Linear(2, 2)) as source, pytest.raises(hw.UsageError, match="asked for a tensor twice"):
        hw.load(nn.Linear(2, 2), Stream(source), verify="loader")
    with hw.open(nn.Linear(2, 2)) as source:  # What the error advises.
        hw.load(nn.Linear(2, 2), dict(Stream(source).tensors()), verify="loader")
    with pytest.raises(hw.UnknownName, match="loader, off"):
        hw.load(nn.Linear(2, 2), nn.Linear(2, 2), verify="twice")


class Flat(nn.Module):
    """Parameters side by side in one buffer, as flattening trainers keep them."""

    def __init__(self):
        super().__init__()
        self.flat = torch.zeros(24)
        self.a = nn.Parameter(self.flat[:8].view(2, 4), requires_grad=False)
        self.b = nn.Parameter(self.flat[8:20].view(3, 4), requires_grad=False)
        self.c = nn.Parameter(self.flat[20:], requires_grad=False)

    def load_weights(self, weights):
        for name, tensor in weights:
            if name == "all":
                self.flat[8:].copy_(tensor)
            else:
                getattr(self, name).data.copy_(tensor * 1.0 if name == "c" else tensor)


@pytest.mark.parametrize("kind", ["apart", "together"])
def test_parameters_of_one_flat_buffer(tmp_path, kind):
    apart = {"a": torch.randn(2, 4), "b": torch.randn(3, 4), "c": torch.randn(4)}
    state = apart if kind == "apart" else {"a": apart["a"], "all": torch.randn(16)}
    write_checkpoint(tmp_path, state)
    for source in (tmp_path, state):
        ours, theirs = Flat(), Flat()
        report = hw.load(ours, source, verify="loader")
        theirs.load_weights(state.items())
        assert torch.equal(ours.flat, theirs.flat)
        assert report.planned == len(state)


def test_a_source_that_is_the_model_itself():
    """Loading code that swaps two names, from the model's own state dict: each would read what the other wrote."""

    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.full((2,), value), requires_grad=False) for value in (0.0, 1.0))

        def load_weights(self, weights):
            for name, tensor in weights:
                getattr(self, {"a": "b", "b": "a"}[name]).data.copy_(tensor)

    ours = Swapped()
    hw.load(ours, ours.state_dict())
    assert (ours.a.tolist(), ours.b.tolist()) == ([1.0, 1.0], [0.0, 0.0])


def test_a_live_model_says_what_was_proven(checkpoint):
    directory, state = checkpoint
    report = hw.LiveModel(Fused()).load(directory, verify="loader")
    assert report.proven == 4
    assert "4 tensors of the model, bit for bit" in str(report)
    report = hw.LiveModel(Fused()).load(directory)
    assert (report.proven, "bit for bit" in str(report)) == (0, False)
    assert "proven" not in str(hw.load(Fused(), state))
