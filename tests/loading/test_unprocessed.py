"""Layers that engines process after loading, and that nobody does: a warning has their names."""

import pytest
import torch
from torch import nn

import hotweights as hw


class Halving:
    def process_weights_after_loading(self, layer):
        layer.weight.data.div_(2)


class Quantised(nn.Linear):
    def __init__(self):
        super().__init__(2, 2, bias=False)
        self.quant_method = Halving()


class Attention(nn.Linear):
    def __init__(self):
        super().__init__(2, 2, bias=False)

    def process_weights_after_loading(self, dtype):
        self.scale = self.weight.max().to(dtype)


def model():
    return nn.ModuleDict({"a": Quantised(), "b": nn.Linear(2, 2, bias=False), "c": Attention()})


WEIGHTS = {f"{name}.weight": torch.ones(2, 2) for name in "abc"}


def warnings(report):
    return [warning for warning in report.warnings if "process_weights_after_loading" in warning]


def test_a_load_processes_nothing():
    (warning,) = warnings(hw.load(model(), WEIGHTS))
    assert warning.startswith("a, c: to be processed after loading")
    assert "or load by hotweights.LiveModel" in warning
    assert not warnings(hw.load(nn.Linear(2, 2), nn.Linear(2, 2)))


def test_a_live_model_processes_what_has_a_quant_method():
    live = hw.LiveModel(model())
    (warning,) = warnings(live.load(WEIGHTS))
    assert warning.startswith("c: to be processed after loading")
    assert "give LiveModel process= and layers=" in warning
    assert warnings(live.update(WEIGHTS)) == [warning]  # It is as true of this version; the log has it once.
    assert live.model["a"].weight.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def process(layer):
    if isinstance(layer, Attention):
        layer.process_weights_after_loading(torch.float32)
    elif isinstance(layer, Quantised):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("options", [{"process": process, "layers": ["a", "c"]}, {"process": process}])
def test_what_it_says_to_give_ends_it(options):
    live = hw.LiveModel(model(), **options)
    assert not warnings(live.load(WEIGHTS))
    assert live.model["c"].scale == 1


def test_layers_that_were_left_out():
    live = hw.LiveModel(model(), layers=lambda layer: False)
    (warning,) = warnings(live.load(WEIGHTS))
    assert warning.startswith("a, c: ")


def test_a_layer_with_several_names_and_the_model_itself():
    shared = Quantised()
    (warning,) = warnings(hw.load(nn.ModuleList([shared, shared]), {"0.weight": torch.ones(2, 2)}))
    assert warning.startswith("0: ")
    (warning,) = warnings(hw.load(Attention(), {"weight": torch.ones(2, 2)}))
    assert warning.startswith("Attention: ")


def test_processed_under_another_name():
    """``layers=`` may name a layer by any of its names."""
    shared = Quantised()
    live = hw.LiveModel(nn.ModuleDict({"x": shared, "y": shared}), layers=["y"])
    assert not warnings(live.load({"x.weight": torch.ones(2, 2)}))


class Processing(nn.ModuleDict):
    def load_weights(self, weights):
        for name, weight in weights:
            self.get_parameter(name).data.copy_(weight)
        for layer in self.values():
            if hasattr(layer, "quant_method"):
                layer.quant_method.process_weights_after_loading(layer)


def test_loading_code_that_processes_by_itself_is_not_told_to_do_it_once_more():
    made = Processing({"a": Quantised(), "c": Attention()})
    (warning,) = warnings(hw.load(made, {"a.weight": torch.ones(2, 2), "c.weight": torch.ones(2, 2)}))
    assert warning.startswith("c: to be processed")
    assert made["a"].weight.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    only = Processing({"a": Quantised()})
    assert not warnings(hw.load(only, {"a.weight": torch.ones(2, 2)}))
