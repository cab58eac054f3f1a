"""Plans that are kept: never traced twice for the same, never stale, never in the way of a model that goes."""

import contextlib
import gc
import sys
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import hotweights as hw
from hotweights.testing import assert_same_bits

load = partial(hw.load, cache=True)  # By default only models that are loaded by name keep their plans.

load_module = sys.modules["hotweights.loading.load"]
FACTOR = 1.0


def helper(tensor):
    return tensor * FACTOR


class Config:
    def __init__(self):
        self.heads = 2


class Loaded(nn.Module):
    """Its loading code looks at a buffer, an attribute, its configuration and a function beside it."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
        self.other = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
        self.register_buffer("index", torch.tensor(0), persistent=False)
        self.config = Config()
        self.rank = 0
        self.listed = [torch.zeros(2)]

    def load_weights(self, pairs):
        index = self.index.item()
        for name, tensor in pairs:
            getattr(self, name).copy_(helper(tensor.roll(index + self.rank, 0)))


def state():
    return {"w": torch.arange(4.0).view(2, 2), "other": torch.arange(4.0, 8.0).view(2, 2)}


@pytest.fixture
def traces(monkeypatch):
    """How often a plan was traced."""
    count = []
    trace = load_module.trace
    monkeypatch.setattr(load_module, "trace", lambda *args, **kwargs: (count.append(1), trace(*args, **kwargs))[1])
    return count


def test_the_same_is_traced_once(traces):
    model, tensors = Loaded(), state()
    for _ in range(3):
        load(model, tensors)
    load(model, {name: tensor.clone() for name, tensor in tensors.items()})
    assert len(traces) == 1
    hw.load(model, tensors, cache=False)
    assert len(traces) == 2


@pytest.fixture
def four_ranks():
    """This process as the first of four, of whom the others are only pretended to be there."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("four_ranks")
def test_every_process_group_counts(traces):
    """Loading code may ask any of them for its rank: those of tensor and of expert parallelism differ."""
    model, tensors = Loaded(), state()
    load(model, tensors)
    for number, ranks in enumerate([[0, 1], [0, 2]], 2):
        torch.distributed.new_group(ranks)
        for _ in range(2):
            load(model, tensors)
        assert len(traces) == number


def test_two_sources_take_turns(traces):
    model = Loaded()
    fewer = {"w": state()["w"]}
    for _ in range(3):
        load(model, state())
        load(model, fewer, allow_missing="other")
    assert len(traces) == 2


def changes():
    """Each part of the key, and how it comes to be another."""

    def setter(name, value):
        return lambda model, patch: setattr(model, name, value)

    def tie(model, patch):
        model.other = model.w

    def strides(model, patch):
        model.w = nn.Parameter(torch.zeros(2, 2).t(), requires_grad=False)

    def alias(model, patch):
        model.listed[0] = model.w.data[0]

    def code(model, patch):
        patch.setattr(Loaded, "load_weights", lambda self, pairs: [getattr(self, n).copy_(t) for n, t in pairs])

    def instance_code(model, patch):
        model.load_weights = lambda pairs: [getattr(model, n).copy_(t) for n, t in pairs]

    def ranks(model, patch):
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_rank", lambda: 1)
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)

    return {
        "value that was asked for": lambda model, patch: model.index.fill_(1),
        "attribute": setter("rank", 1),
        "new attribute": setter("fresh", "x"),
        "configuration": lambda model, patch: setattr(model.config, "heads", 3),
        "dtype": lambda model, patch: model.to(torch.float64),
        "shape of a tensor in a list": setter("listed", [torch.zeros(3)]),
        "strides": strides,
        "tie": tie,
        "tensor in a list becomes a view": alias,
        "parameter's attribute": lambda model, patch: setattr(model.w, "loader", helper),
        "module": lambda model, patch: model.add_module("more", nn.Identity()),
        "hook": lambda model, patch: model.register_load_state_dict_pre_hook(lambda *args: None),
        "class's code": code,
        "instance's code": instance_code,
        "code beside it": lambda model, patch: patch.setitem(globals(), "helper", lambda tensor: tensor + 0),
        "value beside it": lambda model, patch: patch.setitem(globals(), "FACTOR", 2.0),
        "ranks": ranks,
        "version of torch": lambda model, patch: patch.setattr(torch, "__version__", "9.9"),
        "class attribute": lambda model, patch: patch.setattr(Loaded, "mapping", {"a": "b"}, raising=False),
    }


@pytest.mark.parametrize("part", changes())
def test_every_part_of_the_key_counts(part, traces, monkeypatch):
    model, tensors = Loaded(), state()
    load(model, tensors)
    changes()[part](model, monkeypatch)
    try:
        load(model, tensors, cast="loader", allow_missing="*")  # other options: to know what is right
        expected = {name: tensor.clone() for name, tensor in model.named_parameters()}
        count = len(traces)
        load(model, tensors)
        assert_same_bits(dict(model.named_parameters()), expected)
    except hw.PlanError:
        count = 1
    assert len(traces) == count + 1, f"stale: another {part}, and nothing was traced"


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
        self.other = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
        self.register_buffer("table", torch.zeros(2, 2))
        self.register_buffer("scratch", torch.zeros(2, 2), persistent=False)


class OtherTensor(torch.Tensor):
    """Has torch's default behaviour, but is none of torch's own classes."""


class WithExtraState(nn.Module):
    def set_extra_state(self, state):
        pass


def changes_by_name():
    """Each thing that a plan by name depends on, and how it comes to be another."""

    def put(tensor):
        return lambda model: setattr(model, "w", nn.Parameter(tensor, requires_grad=False))

    def tie(model):
        model.other = model.w

    def rename(model):
        model.another = model.other
        del model.other

    def subclass(model):
        model.w = nn.Parameter(torch.zeros(2, 2).as_subclass(OtherTensor), requires_grad=False)

    return {
        "dtype": put(torch.zeros(2, 2, dtype=torch.float64)),
        "shape": put(torch.zeros(1, 2)),
        "strides": put(torch.zeros(2, 2).t()),
        "device": put(torch.zeros(2, 2, device="meta")),
        "layout": put(torch.zeros(2, 2).to_sparse()),
        "class": subclass,
        "uninitialised": lambda model: setattr(model, "w", nn.UninitializedParameter()),
        "tie": tie,
        "name": rename,
        "persistence of one": lambda model: model._non_persistent_buffers_set.add("table"),
        "persistence of the other": lambda model: model._non_persistent_buffers_set.clear(),
        "hook before": lambda model: model.register_load_state_dict_pre_hook(lambda *_: None),
        "hook after": lambda model: model.register_load_state_dict_post_hook(lambda *_: None),
        "extra state": lambda model: setattr(model, "child", WithExtraState()),
        "load_weights": lambda model: setattr(model, "load_weights", lambda pairs: None),
        "load_state_dict": lambda model: setattr(model, "load_state_dict", lambda *_, **__: None),
    }


@pytest.mark.parametrize("what", changes_by_name())
def test_every_part_of_the_key_counts_by_name(what, traces):
    model = ByName()
    tensors = {name: torch.ones(2, 2) for name in ("w", "other", "table")}
    for _ in range(2):
        hw.load(model, tensors)
    assert len(traces) == 1
    changes_by_name()[what](model)
    with contextlib.suppress(hw.HotweightsError):
        hw.load(model, tensors)
    assert len(traces) == 2


def test_moving_every_tensor_is_not_a_change(traces):
    model, tensors = ByName(), {name: torch.ones(2, 2) for name in ("w", "other", "table")}
    hw.load(model, tensors)
    for tensor in model.parameters():
        tensor.data = torch.zeros(2, 2)
    hw.load(model, tensors)
    assert len(traces) == 1
    assert torch.equal(model.w, torch.ones(2, 2))


def test_options_and_manifest_count(traces):
    model = Loaded()
    load(model, state())
    for number, options in enumerate([{"cast": "loader"}, {"allow_missing": "x"}, {"device": "cpu"}], 2):
        load(model, state(), **options)
        assert len(traces) == number
    load(model, state() | {"w": torch.zeros(2, 2, dtype=torch.bfloat16)})
    load(model, dict(reversed(state().items())))  # The order of a manifest is the order in which code sees it.
    assert len(traces) == number + 2


def test_no_model_is_kept_alive():
    def make():
        model = Loaded()
        model.method, model.closure = model.load_weights, lambda: model
        model.w.weight_loader = model.load_weights
        return model

    model = make()
    load(model, state())
    gone, tensor = weakref.ref(model), weakref.ref(model.w)
    del model
    gc.collect()
    assert gone() is None
    assert tensor() is None


class TestOnDisk:
    def test_another_process_need_not_trace(self, traces, tmp_path):
        load(Loaded(), state(), cache_dir=tmp_path / "plans")
        model = Loaded()
        load(model, state(), cache_dir=tmp_path / "plans")
        assert len(traces) == 1
        assert_same_bits(dict(model.named_parameters()), state())

    def test_values_that_were_asked_for_count(self, traces, tmp_path):
        load(Loaded(), state(), cache_dir=tmp_path)
        model = Loaded()
        model.index.fill_(1)
        load(model, state(), cache_dir=tmp_path)
        assert len(traces) == 2
        assert torch.equal(model.w, state()["w"].roll(1, 0))

    @pytest.mark.parametrize("under", ["", "deeper/plans"])
    def test_a_file_in_the_way_costs_the_kept_plan_and_no_load(self, traces, tmp_path, caplog, under):
        way = tmp_path / "file"
        way.write_text("in the way")
        model = Loaded()
        load(model, state(), cache_dir=way / under)
        assert_same_bits(dict(model.named_parameters()), state())
        assert "a plan is not kept for other processes; give cache_dir= a folder: " in caplog.text
        assert str(way) in caplog.text
        assert way.read_text() == "in the way"

    def test_a_damaged_file_is_made_anew(self, traces, tmp_path, caplog):
        load(Loaded(), state(), cache_dir=tmp_path)
        (file,) = tmp_path.iterdir()
        file.write_bytes(b"hotweights plan\nxx")
        load(Loaded(), state(), cache_dir=tmp_path)
        assert len(traces) == 2
        assert "is not used, and made anew" in caplog.text
        hw.LoadPlan.load(file)


WAYS = {
    "indexing": lambda model, tensor: model.w.copy_(tensor[model.perm]),
    "arithmetic": lambda model, tensor: model.w.copy_(tensor[model.perm.argsort()]),
    "a list": lambda model, tensor: model.w.copy_(tensor[model.perm.tolist()]),
    "iteration": lambda model, tensor: [model.w[i : i + 1].copy_(tensor[int(p)]) for i, p in enumerate(model.perm)],
    "numpy": lambda model, tensor: model.w.copy_(tensor[torch.from_numpy(model.perm.numpy().copy())]),
    "an attribute": lambda model, tensor: model.w.copy_(tensor * model.scale),
    "a number": lambda model, tensor: model.w.copy_(tensor * float(model.scale)),
    "a fill": lambda model, tensor: model.w.copy_(model.scale.expand(4)),
}


@pytest.mark.parametrize("way", WAYS)
def test_values_of_the_model_are_never_stale(way):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4), requires_grad=False)
            self.register_buffer("perm", torch.tensor([3, 2, 1, 0]), persistent=False)
            self.scale = torch.tensor(2.0)

        def load_weights(self, pairs):
            for _, tensor in pairs:
                WAYS[way](self, tensor)

    model, tensor = Model(), torch.arange(4.0)
    load(model, {"w": tensor})
    model.perm.copy_(torch.tensor([1, 2, 0, 3]))
    model.scale.fill_(3.0)
    load(model, {"w": tensor})
    loaded = model.w.tolist()
    WAYS[way](model, tensor)
    assert loaded == model.w.tolist()
