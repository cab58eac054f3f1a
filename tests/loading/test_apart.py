"""A source in the model's own memory: by every way in, the model gets what it held before, under other names."""

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights import Component

ORDER = [2, 0, 3, 1]
WAYS = ("staged", "journal", False)


class Experts(nn.Module):
    """Four experts, in the places where a model may have them; all of them are the checkpoint's."""

    def __init__(self, kind="separate"):
        super().__init__()
        whole = torch.arange(4.0).view(4, 1, 1).expand(4, 2, 3).clone()
        if kind == "tied":
            self.first = nn.Parameter(whole[0])
        for number in range(4):
            expert = whole[number] if kind == "views" else whole[number].clone()
            if kind == "buffers":
                self.register_buffer(f"e{number}", expert)
            else:
                self.register_parameter(
                    f"e{number}", self.first if (kind, number) == ("tied", 0) else nn.Parameter(expert)
                )

    def values(self):
        return [getattr(self, f"e{number}").flatten()[0].item() for number in range(4)]


KINDS = ("separate", "views", "buffers", "tied")


def as_they_are(tensor):
    return tensor


def through_numpy(tensor):
    """Another storage over the same bytes, which begins in the middle."""
    return torch.from_numpy(tensor.detach().numpy()[:])


SEEN = {"data": lambda tensor: tensor.data, "itself": as_they_are, "numpy": through_numpy}


@pytest.fixture(params=KINDS)
def model(request):
    return Experts(request.param)


@pytest.fixture(params=SEEN)
def permuted(request, model):
    """Pairs that give each expert the memory of another."""
    return lambda: {
        **({"first": model.e2.data} if hasattr(model, "first") else {}),
        **{f"e{number}": SEEN[request.param](getattr(model, f"e{other}")) for number, other in enumerate(ORDER)},
    }


def stream(state, **options):
    return hw.from_iterator(iter(state.items()), hw.open(state).manifest, **options)


def once(state):
    return hw.from_iterator(iter(state.items()), borrowed=False)


FORMS = {
    "mapping": lambda state: state,
    "stream": stream,
    "kept stream": lambda state: stream(state, borrowed=False),
    "no manifest": once,
}


@pytest.mark.parametrize("form", FORMS)
def test_load(model, permuted, form):
    hw.load(model, FORMS[form](permuted()))
    assert model.values() == ORDER


@pytest.mark.parametrize("form", FORMS)
def test_the_first_load_of_a_live_model(model, permuted, form):
    hw.LiveModel(model).load(FORMS[form](permuted()))
    assert model.values() == ORDER


@pytest.mark.parametrize("atomic", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_update(model, permuted, form, atomic):
    live = hw.LiveModel(model)
    live.load({name: tensor.clone() for name, tensor in model.state_dict().items()})
    live.update(FORMS[form](permuted()), atomic=atomic)
    assert model.values() == ORDER


@pytest.mark.parametrize("atomic", WAYS)
def test_feed(model, permuted, atomic):
    live = hw.LiveModel(model)
    live.load({name: tensor.clone() for name, tensor in model.state_dict().items()})
    with live.begin(atomic=atomic) as update:
        if atomic == "staged":
            update.feed(permuted())
            update.commit()
            assert model.values() == ORDER
            return
        with pytest.raises(hw.UpdateAborted, match="own memory"):
            update.feed(permuted())
    if atomic == "journal":
        assert model.values() == [0, 1, 2, 3]


class Layers(nn.Module):
    """Layers that are processed one by one."""

    def __init__(self):
        super().__init__()
        for number in range(4):
            self.add_module(f"e{number}", nn.Linear(2, 2, bias=False))
            nn.init.constant_(self.get_submodule(f"e{number}").weight, number)

    def permuted(self):
        return {f"e{number}.weight": self.get_submodule(f"e{other}").weight for number, other in enumerate(ORDER)}

    def values(self):
        return [layer.weight[0, 0].item() for layer in self.children()]


def doubled(layer):
    layer.weight.data.mul_(2)


@pytest.mark.parametrize(
    ("form", "verify"), [*((form, "off") for form in FORMS), ("mapping", "loader"), ("no manifest", "loader")]
)
def test_layers_that_are_processed_one_by_one(form, verify):
    model = Layers()
    hw.LiveModel(model, process=doubled).load(FORMS[form](model.permuted()), verify=verify)
    assert model.values() == [2.0 * value for value in ORDER]


@pytest.mark.parametrize("atomic", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_updates_of_layers_that_are_processed(form, atomic):
    model = Layers()
    live = hw.LiveModel(model, process=doubled)
    live.load({name: tensor.clone() for name, tensor in model.state_dict().items()})
    live.update(FORMS[form](model.permuted()), atomic=atomic)  # kernel format, doubled once, is doubled again
    assert model.values() == [4.0 * value for value in ORDER]


class ByCode(Experts):
    def load_weights(self, pairs):
        own = dict(self.named_parameters(remove_duplicate=False)) | dict(self.named_buffers())
        for name, tensor in pairs:
            own[name].data.copy_(tensor)


class Unplanned(Experts):
    """Its loading code falls back: a plan cannot repeat what it decides by a value."""

    def load_weights(self, pairs):
        own = dict(self.named_parameters(remove_duplicate=False)) | dict(self.named_buffers())
        for name, tensor in pairs:
            if float(tensor.sum()) >= 0:
                own[name].data.copy_(tensor)


@pytest.mark.parametrize("kind", [ByCode, Unplanned])
@pytest.mark.parametrize("form", FORMS)
def test_loading_code_of_the_models_own(kind, form):
    model = kind()
    hw.load(model, FORMS[form]({f"e{number}": getattr(model, f"e{other}") for number, other in enumerate(ORDER)}))
    assert model.values() == ORDER


def test_a_loader_verifies_what_it_was_given():
    model = Experts()
    state = {f"e{number}": getattr(model, f"e{other}") for number, other in enumerate(ORDER)}
    hw.load(model, state, verify="loader")
    assert model.values() == ORDER


@pytest.mark.parametrize("borrowed", [True, False])
def test_what_was_written_over_by_then_is_refused_and_never_loaded(borrowed):
    """The stream begins with foreign tensors, and then gives what one of them was written to."""
    model = Experts()
    state = {"e0": torch.full((2, 3), 9.0), "e1": model.e2, "e2": model.e0, "e3": torch.zeros(2, 3)}
    with stream(state, borrowed=borrowed) as source, pytest.raises(hw.SourceError, match="e2: lies where an earlier"):
        hw.load(model, source)
    for atomic in ("journal", False):
        model = Experts()
        live = hw.LiveModel(model)
        live.load({name: tensor.clone() for name, tensor in model.state_dict().items()})
        state |= {"e1": model.e2, "e2": model.e0}
        with stream(state, borrowed=borrowed) as source, pytest.raises(hw.UpdateAborted, match="e2: lies where an ear"):
            live.update(source, atomic=atomic)
        if atomic == "journal":
            assert model.values() == [0, 1, 2, 3]


def test_foreign_tensors_may_come_first_if_they_are_written_elsewhere():
    model = Experts()
    state = {"e3": torch.full((2, 3), 9.0), "e0": model.e2, "e1": model.e0, "e2": model.e1}
    hw.load(model, stream(state))
    assert model.values() == [2, 0, 1, 9]


# Routing.


class Pair(nn.Module):
    def __init__(self, kind=Experts):
        super().__init__()
        self.left, self.right = kind(), kind()
        for number in range(4):
            getattr(self.right, f"e{number}").data.add_(10)

    def swapped(self):
        """Each gets the experts of the other, in another order."""
        sides = {"left": self.right, "right": self.left}
        return {
            f"{side}.e{number}": getattr(other, f"e{order}").data
            for side, other in sides.items()
            for number, order in enumerate(ORDER)
        }

    def values(self):
        return self.left.values() + self.right.values()


def own_code(module):
    def load_weights(pairs):
        for name, tensor in pairs:
            getattr(module, name).data.copy_(tensor)

    return load_weights


GLOBAL = []


def by_a_global(pairs):
    for name, tensor in pairs:
        getattr(GLOBAL[0], name).data.copy_(tensor)


def code_with_a_global(module):
    GLOBAL[:] = [module]
    return by_a_global


TARGETS = {
    "module": lambda module: module,
    "function": own_code,
    "method": lambda module: ByCode.load_weights.__get__(module),
    "global": code_with_a_global,
}
ROUTED = {**FORMS, "pairs": lambda state: iter(state.items())}


@pytest.mark.parametrize("borrowed", [True, False])
@pytest.mark.parametrize("form", ROUTED)
@pytest.mark.parametrize("target", TARGETS)
def test_components_that_swap(target, form, borrowed):
    model = Pair()
    parts = [Component("left.", TARGETS[target](model.left)), Component("right.", model.right)]
    hw.route(ROUTED[form](model.swapped()), parts, borrowed=borrowed)
    assert model.values() == [10.0 + value for value in ORDER] + ORDER


@pytest.mark.parametrize("form", ["stream", "pairs"])
@pytest.mark.parametrize("target", TARGETS)
def test_components_are_not_given_what_was_written_over(target, form):
    model = Pair()
    state = {"left.e0": torch.full((2, 3), 9.0)} | {
        name: tensor for name, tensor in model.swapped().items() if name != "left.e0"
    }
    parts = [Component("left.", TARGETS[target](model.left)), Component("right.", model.right)]
    if (target, form) == ("module", "pairs"):  # It waits for the end, so nothing was written over.
        hw.route(ROUTED[form](state), parts)
        assert model.values() == [9, 10, 13, 11, *ORDER]
        return
    with pytest.raises(hw.SourceError, match="lies where an earlier tensor"):
        hw.route(ROUTED[form](state), parts)


def test_what_is_held_counts_as_waiting():
    model = Pair()
    with pytest.raises(hw.RoutingError, match="memory_limit=50"):
        hw.route(iter(model.swapped().items()), [Component("", own_code(model))], memory_limit=50)


def test_tensors_of_others_are_not_copied():
    """One tensor of the model's own memory costs a copy of that, not of the checkpoint."""
    model = Experts()
    state = {f"e{number}": torch.full((2, 3), 5.0) for number in range(3)} | {"e3": model.e2}
    assert hw.load(model, state).peak_scratch_bytes == model.e2.nbytes
    assert model.values() == [5, 5, 5, 2]
