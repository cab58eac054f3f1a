"""Survey: loading by name is all that a model asks for, or what else there is is named."""

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.model.survey import by_name, counters, extra_states, hook_problems, loader_of, survey


class OwnCode(nn.Linear):
    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)


class ExtraState(nn.Linear):
    def get_extra_state(self):
        return 1

    def set_extra_state(self, state):
        pass


def hooked():
    layer = nn.Linear(1, 1)
    layer.register_load_state_dict_post_hook(lambda module, keys: None)
    return layer


def replaced():
    model = nn.Linear(1, 1)
    model.load_state_dict = lambda state, strict=True: None
    return model


def test_tensors_are_in_the_order_of_the_state_dict():
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    model[0].register_buffer("cache", torch.zeros(1), persistent=False)
    found = survey(model)
    assert [name for name in found.tensors if name not in found.transient] == list(model.state_dict())
    assert found.transient == ["0.cache"]
    assert found.plain


def test_a_tied_tensor_has_all_its_names():
    model = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})
    model["b"].weight = model["a"].weight
    assert list(survey(model).tensors) == ["a.weight", "b.weight"]


@pytest.mark.parametrize("make", [lambda: nn.Sequential(OwnCode(1, 1)), lambda: nn.Sequential(hooked()), replaced])
def test_loading_code_is_noticed(make):
    model = make()
    assert not survey(model).plain
    assert any(hook_problems(model))
    assert loader_of(model) is not None


def test_plain_modules_have_no_loading_code():
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))  # whose own code only fills in counters
    assert not any(hook_problems(model))
    assert loader_of(model) is None


def test_extra_state_is_named():
    model = nn.Sequential(ExtraState(1, 1))
    assert not survey(model).plain
    assert extra_states(model) == {"0._extra_state": model[0]}
    assert loader_of(model) is not None


def test_loading_code_that_yields_is_run_to_its_end():
    loaded = []

    class Yields(nn.Module):
        def load_weights(self, pairs):
            for name, _ in pairs:
                loaded.append(name)
                yield name

    loader_of(Yields())([("a", torch.ones(1)), ("b", torch.ones(1))])
    assert loaded == ["a", "b"]


def test_lazy_parameters_are_not_made_real():
    assert loader_of(nn.Sequential(OwnCode(1, 1), nn.LazyLinear(1))) is None


def test_counters_of_batch_norm_may_be_absent():
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
    assert counters(model, ["0.num_batches_tracked", "0.weight", "1.weight"]) == ["0.num_batches_tracked"]


def test_by_name_loads_what_there_is():
    model = nn.Linear(2, 1)
    by_name(model)([("weight", torch.ones(1, 2))])
    assert model.weight.tolist() == [[1, 1]]


class WithPart(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.body = nn.Sequential(part)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.body(x))


def traced(part):
    return torch.jit.trace(part, torch.rand(1, 4))


HIDDEN = {
    "traced": lambda: traced(nn.Linear(4, 4)),
    "traced around others": lambda: traced(nn.Sequential(nn.Linear(4, 4))),
    "mkldnn": lambda: torch.utils.mkldnn.to_mkldnn(nn.Sequential(nn.Linear(4, 4))),
}
ROADS = {
    "load": hw.load,
    "trace": hw.trace,
    "live": lambda model, state: hw.LiveModel(model).load(state),
    "route": lambda model, state: hw.route(state, [hw.Component("", model)]),
    "digest": lambda model, state: hw.LiveModel(model).digest(),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("kind", HIDDEN)
def test_parts_that_do_not_show_their_tensors_are_refused_by_name(kind, road):
    import torch.utils.mkldnn

    model = WithPart(HIDDEN[kind]())
    state = {"head.weight": torch.ones(4, 4), "head.bias": torch.ones(4)}
    with pytest.raises(hw.UsageError, match=r"body\.0.* \(.*(Traced|Mkldnn).*load the model before its parts"):
        ROADS[road](model, state)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [lambda: traced(nn.ReLU()), lambda: torch.jit.script(nn.Linear(4, 4))])
def test_parts_without_tensors_and_scripted_ones_are_loaded(make):
    model = WithPart(make())
    state = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    live = hw.LiveModel(model)
    live.load(state)
    live.update({name: tensor * 2 for name, tensor in state.items()})
    hw.load(model, state, verify="loader")
    assert all((tensor == 1).all() for tensor in model.state_dict().values())
    expected = 5 * (4 * 5 + 1) / 5 if "body.0.weight" in state else 5
    assert (model(torch.ones(1, 4)) == expected).all()


def test_mkldnn_tensors_are_refused_by_name():
    model = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(torch.zeros(2, 2).to_mkldnn(), requires_grad=False)
    with pytest.raises(hw.PlanError, match=r"weight: has the layout torch\._mkldnn"):
        hw.load(model, {"weight": torch.ones(2, 2)})
