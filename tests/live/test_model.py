"""LiveModel: what it takes, what it says, and how its first load is proven."""

import contextlib
import json
import re

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.testing import ReusedBuffer, assert_same_bits, write_checkpoint, write_safetensors


def mlp():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def tensors(seed=1):
    torch.manual_seed(seed)
    return {name: torch.randn_like(tensor) for name, tensor in mlp().state_dict().items()}


def doubled(layer):
    layer.weight = nn.Parameter(layer.weight.t().contiguous() * 2, requires_grad=False)


def test_layers_are_selected_by_name_or_by_a_function():
    for number in range(3):
        model, weights = mlp(), tensors()
        layers = ("1", [re.compile("1")], lambda module, chosen=model[1]: module is chosen)[number]
        hw.LiveModel(model, process=doubled, layers=layers).load(weights)
        assert torch.equal(model[0].weight, weights["0.weight"])
        assert torch.equal(model[1].weight, weights["1.weight"].t() * 2)


def test_deferred_layers_are_selected_by_name_or_by_a_function():
    for number in range(2):
        order, model = [], mlp()
        deferred = ("0", lambda module, chosen=model[0]: module is chosen)[number]
        live = hw.LiveModel(model, process=order.append, deferred=deferred)
        live.load(tensors())
        assert order == [model[1], model[0]]


class Lying(nn.Module):
    """Its loading code makes other values when it runs again: a plan traced before is no longer what it does."""

    def __init__(self):
        super().__init__()
        self.right, self.wrong = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.traced = False

    def load_weights(self, pairs):
        own = dict(self.named_parameters())
        for name, tensor in pairs:
            own[name].data.copy_(tensor)
            if name == "wrong.weight" and type(tensor) is torch.Tensor:
                own[name].data.mul_(2)


def test_a_first_load_is_proven_before_it_is_processed():
    weights = {"right.weight": torch.randn(4, 4), "wrong.weight": torch.randn(4, 4)}
    model = Lying()
    live = hw.LiveModel(model, process=lambda layer: doubled(layer) if hasattr(layer, "weight") else None)
    with pytest.raises(hw.PlanDiffers, match=r"wrong\.weight") as caught:
        live.load(weights, verify="loader")
    assert caught.value.problems == ("wrong.weight",)
    assert live.state is hw.State.EMPTY
    assert model.wrong.weight.shape == (4, 4)

    weights = tensors()
    model = mlp()
    live = hw.LiveModel(model, process=doubled)
    live.load(weights, verify="loader")
    assert torch.equal(model[0].weight, weights["0.weight"].t() * 2)
    live.update(tensors(2))
    assert torch.equal(model[0].weight, tensors(2)["0.weight"].t() * 2)


class Doubling:
    """Processes a layer in place, or puts another parameter in its place."""

    def __init__(self, replaces):
        self.replaces = replaces

    def process_weights_after_loading(self, layer):
        if self.replaces:
            layer.weight = nn.Parameter(layer.weight.data * 2, requires_grad=False)
        else:
            layer.weight.data.mul_(2)


class SharedSource(nn.Module):
    """Two layers are the halves of one source tensor, a third has its own, and a fourth is tied to that."""

    item = False

    def __init__(self, replaces):
        super().__init__()
        for name in "abcd":
            layer = nn.Linear(4, 2, bias=False)
            layer.weight.weight_loader = lambda parameter, tensor: parameter.data.copy_(tensor)
            layer.quant_method = Doubling(replaces) if name != "d" else None
            self.add_module(name, layer)
        self.d.weight = self.c.weight

    def load_weights(self, pairs):
        for name, tensor in pairs:
            if self.item:
                float(tensor.sum())
            for layer, part in zip((self.a, self.b), tensor.chunk(2), strict=True) if name == "ab" else ():
                layer.weight.weight_loader(layer.weight, part)
            if name == "c":
                self.c.weight.weight_loader(self.c.weight, tensor)


@pytest.mark.parametrize("deferred", [(), "a", "b"])
@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("item", [False, True])
def test_what_a_proven_load_leaves_is_what_it_leaves_without_proof(replaces, deferred, item, tmp_path):
    first, second = ({"ab": torch.randn(4, 4), "c": torch.randn(2, 4)} for _ in range(2))
    for source in (first, write_checkpoint(tmp_path, first)):
        held = []
        for verify in ("off", "loader"):
            model = SharedSource(replaces)
            model.item = item
            live = hw.LiveModel(model, deferred=deferred)
            report = live.load(source, verify=verify)
            held.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            live.update(second)
            held[-1] |= {f"then {name}": tensor.clone() for name, tensor in model.state_dict().items()}
        assert report.proven == (0 if item else 3)
        assert_same_bits(*held)
        assert torch.equal(held[0]["a.weight"], first["ab"][:2] * 2)


def test_what_only_streams_cannot_be_proven():
    live = hw.LiveModel(mlp())
    manifest = hw.open(tensors()).manifest
    with pytest.raises(hw.UsageError, match="asked for a tensor twice"):
        live.load(hw.from_iterator(ReusedBuffer(tensors()), manifest), verify="loader")
    with pytest.raises(hw.UnknownName, match="off"):
        live.load(tensors(), verify="twice")
    live.load(tensors())


def test_a_device_that_is_none_is_told_before_anything_happens():
    live = hw.LiveModel(mlp())
    with pytest.raises(hw.UsageError, match="device='nonsense' is no device"):
        live.load(tensors(), device="nonsense")
    assert live.state is hw.State.EMPTY


def test_an_empty_and_a_torn_model_say_what_mends_them():
    live = hw.LiveModel(mlp(), atomic=False)
    with pytest.raises(hw.LiveModelError, match="call load"), live.serving():
        pass
    live.load(tensors(1))
    with live.begin() as update:
        update.feed(list(tensors(2).items())[:2])
    assert live.state is hw.State.TORN
    with pytest.raises(hw.LiveModelError, match="call update with a complete source"), live.serving():
        pass
    with pytest.raises(hw.UsageError, match="use update"):
        live.load(tensors(3))
    with pytest.raises(hw.UsageError, match="leave only= out"):
        live.update(tensors(3), only="0.*")
    live.update(tensors(3))
    with live.serving() as version:
        assert version == 2


def test_problems_are_those_of_the_cause():
    live = hw.LiveModel(mlp())
    live.load(tensors())
    with pytest.raises(hw.UpdateAborted, match=r"the update was refused; version 1 is live: .*2 problems") as caught:
        live.update({"0.weight": torch.zeros(4, 4), "0.bias": torch.zeros(4)})
    assert caught.value.problems == caught.value.__cause__.problems
    assert len(caught.value.problems) == 2


def test_a_report_is_plain_data():
    live = hw.LiveModel(mlp())
    report = live.load(tensors(), version="a")
    facts = json.loads(json.dumps(report.as_dict()))
    assert facts["version"] == "a"
    assert facts["tensors"]["written"] == sorted(tensors())
    assert facts["bytes_by_io"] == {"memory": report.bytes_read}
    assert {event["what"] for event in facts["events"]} == {"read", "prepare", "commit"}


class Half(nn.Module):
    """A rank that takes the upper half of a tensor, and one tensor in two places."""

    def __init__(self):
        super().__init__()
        self.half, self.whole = nn.Linear(64, 32, bias=False), nn.Linear(4, 4, bias=False)

    def load_weights(self, pairs):
        own = dict(self.named_parameters())
        for name, tensor in pairs:
            own[name].data.copy_(tensor[:32] if name == "half.weight" else tensor)


@pytest.mark.parametrize("source", ["mapping", "files", "stream"])
def test_progress_ends_at_its_total_though_a_rank_reads_slices(source, tmp_path, monkeypatch):
    totals, advanced = [], []

    @contextlib.contextmanager
    def recorded(title, total, *, show):
        totals.append(total)
        advanced.append(0)

        def advance(nbytes):
            advanced[-1] += nbytes

        yield advance

    monkeypatch.setattr("hotweights.live.update.progress", recorded)
    weights = {"half.weight": torch.randn(64, 64), "whole.weight": torch.randn(4, 4)}
    live = hw.LiveModel(Half())
    for _ in range(2):
        if source == "mapping":
            given = weights
        elif source == "files":
            given = tmp_path / "model.safetensors"
            write_safetensors(given, weights)
        else:
            given = hw.from_iterator(ReusedBuffer(weights), hw.open(weights).manifest)
        live.update(given) if totals else live.load(given)
    assert advanced == totals
    whole = sum(tensor.nbytes for tensor in weights.values())
    assert totals == [whole if source == "stream" else whole - 32 * 64 * 4] * 2


def test_a_model_on_meta_has_no_digest():
    """Two different models had equal ones."""
    with torch.device("meta"):
        live = hw.LiveModel(nn.Linear(2, 2))
    with pytest.raises(hw.LiveModelError, match=r"nothing was loaded yet: weight, bias on meta.*call load first"):
        live.digest()
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    live.load(state, device="cpu")
    with hw.open(state) as source:
        assert live.digest() == source.digest()


def test_a_digest_is_of_what_is_live_and_not_of_what_came():
    """A payload that is right proves nothing: a hook, a kernel or a stray write may have changed the model since."""
    live = hw.LiveModel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    state = {name: torch.randn_like(tensor) for name, tensor in live.model.state_dict().items()}
    live.load(state)
    digest = live.digest()
    live.on_commit(lambda version: live.model[1].bias.data.zero_())
    live.update(state)
    assert [name for name, of in live.digest().tensors.items() if of != digest.tensors[name]] == ["1.bias"]
    live.model[1].bias.data.copy_(state["1.bias"])
    assert live.digest() == digest
    live.model[0].weight = nn.Parameter(state["0.weight"] * 2)
    assert live.digest() != digest
