"""Layers are processed once: not again from their own kernel format, nor by loading code and live model both."""

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.model.process_calls import noting_calls


class Transposing:
    """A square weight stays square: nothing but its values shows that it was transposed twice."""

    def process_weights_after_loading(self, layer):
        layer.weight = nn.Parameter(layer.weight.t().contiguous(), requires_grad=False)


class Engine(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.a.quant_method = Transposing()


class Impatient(Engine):
    def load_weights(self, weights):
        for name, tensor in weights:
            self.get_parameter(name).data.copy_(tensor)
        self.a.quant_method.process_weights_after_loading(self.a)


def tensors(first=0.0):
    return {f"{name}.weight": torch.arange(first, first + 9).view(3, 3) for name in "ab"}


def loaded():
    live = hw.LiveModel(Engine())
    live.load(tensors(), version="step-1")
    return live


def is_right(model, first=0.0):
    weight = tensors(first)["a.weight"]
    return torch.equal(model.a.weight, weight.t()) and torch.equal(model.b.weight, weight)


@pytest.mark.parametrize("source", [lambda model: model, lambda model: model.state_dict()])
def test_an_update_from_what_was_processed_is_refused(source):
    live = loaded()
    with pytest.raises(hw.UpdateAborted, match="kernel format, which would be processed once more") as caught:
        live.update(source(live.model))
    assert caught.value.problems == ("a.weight: lies in a layer of the live model that was processed",)
    assert live.version == "step-1"
    assert is_right(live.model)
    for given in (
        lambda update: update.feed(live.model.state_dict()),
        lambda update: update.feed(live.model.state_dict().items()),
    ):
        with pytest.raises(hw.UpdateAborted, match=r"a\.weight: lies in a layer"), live.begin() as update:
            given(update)
    state = live.model.state_dict()
    with pytest.raises(hw.UpdateAborted, match=r"a\.weight: lies in a layer"):
        live.update(hw.from_iterator(iter(state.items()), hw.open(state).manifest))
    assert is_right(live.model)
    live.update({**tensors(), "b.weight": live.model.b.weight})  # That layer nobody processed.
    live.update({name: tensor.clone() for name, tensor in live.model.state_dict().items()})  # As the error says.


def test_a_first_load_from_what_a_live_model_has_processed_is_refused():
    model = loaded().model
    with pytest.raises(hw.SourceError, match=r"a\.weight: lies in a layer"):
        hw.LiveModel(model).load(model)
    assert is_right(model)


@pytest.mark.parametrize("source", [lambda model: model, lambda model: model.state_dict()])
def test_a_first_load_from_layers_of_its_own_is_refused(source):
    model = Engine()
    hw.load(model, tensors())
    Transposing().process_weights_after_loading(model.a)  # Its engine did; nothing of the model shows it.
    live = hw.LiveModel(model)
    with pytest.raises(hw.SourceError, match=r"a\.weight: lies in a layer of this model that has a quant_method"):
        live.load(source(model))
    assert is_right(model)
    live.load(tensors(1.0))  # As the error says.
    assert is_right(model, 1.0)
    model = Engine()
    hw.load(model, tensors())
    hw.LiveModel(model).load({name: tensor.clone() for name, tensor in model.state_dict().items()})  # As it says, too.
    assert is_right(model)
    assert hw.LiveModel(Engine()).load(Engine()).warnings == ()


class OwnMethod(nn.Linear):
    def process_weights_after_loading(self):
        self.weight = nn.Parameter(self.weight.t().contiguous(), requires_grad=False)


class ImpatientOwn(Impatient):
    def __init__(self):
        super().__init__()
        self.a = OwnMethod(3, 3, bias=False)

    def load_weights(self, weights):
        for name, tensor in weights:
            self.get_parameter(name).data.copy_(tensor)
        self.a.process_weights_after_loading()


def test_loading_code_that_calls_a_layers_own_method_is_seen():
    calls_it = hw.LiveModel(ImpatientOwn(), process=OwnMethod.process_weights_after_loading, layers="a")
    with pytest.raises(hw.PlanError, match=r"a: ImpatientOwn\.load_weights processes these layers itself"):
        calls_it.load(tensors())
    for process in (None, lambda layer: None):
        model = ImpatientOwn()
        live = hw.LiveModel(model, process=process)
        assert live.load(tensors()).warnings == ()  # Nor that nobody does it.
        assert is_right(model)
        live.update(tensors(1.0))
        assert is_right(model, 1.0)


class Packing:
    def process_weights_after_loading(self, layer):
        layer.packed = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
        del layer.weight


@pytest.mark.parametrize(
    ("shape", "method", "came", "is_told"),
    [
        ((4, 3), Transposing(), (4, 3), True),
        ((4, 3), Packing(), (4, 3), True),
        ((4, 3), None, (8, 3), False),  # another rank's
        ((4, 3), None, (2, 3), False),
    ],
)
def test_processing_by_an_engine_is_told_where_it_can_be(shape, method, came, is_told):
    model = Engine()
    model.a = nn.Linear(*reversed(shape), bias=False)
    model.a.quant_method = method or Transposing()
    if method is not None:
        method.process_weights_after_loading(model.a)
    with pytest.raises(hw.PlanError) as caught:
        hw.LiveModel(model).load({**tensors(), "a.weight": torch.ones(came)})
    assert ("If an engine has processed" in str(caught.value)) == is_told
    assert not (is_told and "allow_" in str(caught.value))


def test_loading_code_that_processes_too_is_refused():
    for options in ({}, {"verify": "loader"}):
        model = Impatient()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(hw.PlanError, match=r"a: Impatient\.load_weights processes these layers itself") as caught:
            hw.LiveModel(model).load(tensors(), **options)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert "process=lambda layer: None" in str(caught.value)
    assert "_noting" not in Transposing.process_weights_after_loading.__qualname__
    live = hw.LiveModel(Impatient(), process=lambda layer: None)  # As the error says.
    live.load(tensors())
    assert is_right(live.model)
    live.update(tensors(1.0))
    assert is_right(live.model, 1.0)


def test_what_nobody_processes_is_logged_once_and_stays_in_the_reports(caplog):
    class Own(nn.Linear):
        def process_weights_after_loading(self):
            pass

    model = Own(2, 2)
    live = hw.LiveModel(model)
    for version in range(3):
        report = (live.update if version else live.load)(nn.Linear(2, 2), version=version)
        (warning,) = report.warnings
        assert warning.startswith("Own: to be processed after loading")
        assert live.status()["last_report"]["warnings"] == [warning]
    assert caplog.text.count("to be processed after loading") == 1


def test_models_that_load_in_threads_leave_no_trace_in_the_class():
    before = Transposing.process_weights_after_loading
    first, second = Engine().a, Engine().a
    one, other = noting_calls([first]), noting_calls([second])
    by_one, by_other = one.__enter__(), other.__enter__()
    second.quant_method.process_weights_after_loading(second)
    one.__exit__(None, None, None)  # Not the last that began.
    second.quant_method.process_weights_after_loading(second)
    other.__exit__(None, None, None)
    assert (by_one, by_other) == ([], [second, second])
    assert Transposing.process_weights_after_loading is before


class Quantising(Engine):
    """Its loading code quantises inline, where a ``quant_method`` transposes."""

    def load_weights(self, weights):
        for name, tensor in weights:
            self.get_parameter(name).data.copy_(tensor)
        self.a.weight = nn.Parameter((self.a.weight * 2).to(torch.int8), requires_grad=False)


class QuantisingData(Engine):
    def load_weights(self, weights):
        for name, tensor in weights:
            self.get_parameter(name).data.copy_(tensor)
        self.a.weight.requires_grad_(False)
        self.a.weight.data = (self.a.weight.data * 2).to(torch.int8)


@pytest.mark.parametrize("kind", [Quantising, QuantisingData])
def test_what_loading_code_has_quantised_is_not_processed_unasked(kind):
    """It was, once more and without a word."""
    live = hw.LiveModel(kind())
    with pytest.raises(hw.PlanError, match="once too often") as caught:
        live.load(tensors())
    assert caught.value.problems == (f"a.weight: F32 [3, 3] before; {kind.__name__}.load_weights left it as I8 [3, 3]",)
    assert live.state is hw.State.EMPTY
    assert live.model.a.weight.dtype == torch.float32
    made = (tensors()["a.weight"] * 2).to(torch.int8)
    options = "process=lambda layer: None", "layers=lambda layer: hasattr(layer, 'quant_method')"
    assert all(option in caught.value.advice for option in options)
    live = hw.LiveModel(kind(), process=lambda layer: None)
    live.load(tensors())
    assert torch.equal(live.model.a.weight, made)
    live = hw.LiveModel(
        kind(),
        process=lambda layer: layer.quant_method.process_weights_after_loading(layer),
        layers=lambda layer: hasattr(layer, "quant_method"),
    )
    live.load(tensors())
    assert torch.equal(live.model.a.weight, made.t())


def test_processing_that_returns_another_layer_is_refused():
    """What it returns was dropped, without a word."""
    live = hw.LiveModel(Engine(), process=lambda layer: nn.Linear(2, 2))
    with pytest.raises(hw.UsageError, match="process= returned a Linear, which nobody would use"):
        live.load(tensors())
    hw.LiveModel(Engine(), process=lambda layer: layer.eval()).load(tensors())


class QuantisesItself(nn.Module):
    """Its loader leaves the weight in int8."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def load_weights(self, pairs):
        for _, tensor in pairs:
            self.layer.weight = nn.Parameter((tensor * 10).to(torch.int8), requires_grad=False)


def test_a_process_that_changes_what_the_loader_has_quantised_is_a_warning():
    def quantise(layer):
        layer.weight = nn.Parameter((layer.weight.float() * 10).to(torch.int8), requires_grad=False)

    def leave(layer):
        pass

    weights = {"layer.weight": torch.ones(4, 4)}
    report = hw.LiveModel(QuantisesItself(), process=quantise, layers="layer").load(weights)
    (told,) = [warning for warning in report.warnings if "if both quantise" in warning]
    assert told.startswith("layer.weight: F32 [4, 4] before; QuantisesItself.load_weights left it as I8 [4, 4]")
    report = hw.LiveModel(QuantisesItself(), process=leave, layers="layer").load(weights)
    assert not [warning for warning in report.warnings if "if both quantise" in warning]
