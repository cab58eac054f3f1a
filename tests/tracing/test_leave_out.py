"""Leaving out what no plan can repeat: what it costs, and which tensors go together."""

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.tracing import leave_out


class Asking(nn.Module):
    """Two layers; the loading code asks for a value of the second one's tensors."""

    def __init__(self):
        super().__init__()
        self.plain, self.asked = nn.Linear(2, 2), nn.Linear(2, 2)

    def load_weights(self, pairs):
        for name, tensor in pairs:
            scale = tensor.max().item() if name == "asked.weight" else 1
            self.get_parameter(name).data.copy_(tensor * scale)


def test_each_recording_is_lowered_once(monkeypatch):
    lower, lowered = leave_out.lower, []
    monkeypatch.setattr(leave_out, "lower", lambda ops: lowered.append(ops) or lower(ops))
    plan = hw.trace(Asking(), hw.open(nn.Module.state_dict(Asking())).manifest)
    assert plan.fallback == ("asked.weight", "asked.bias")
    assert len(lowered) == 2  # the run that broke, and the one without the layer
    assert lowered[0] is not lowered[1]


def test_a_line_of_code_is_told_once_with_all_names():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Asking() for _ in range(3))
            self.odd = nn.Linear(2, 2)

        def load_weights(self, pairs):
            for name, tensor in pairs:
                asks = name.endswith("asked.weight") or name == "odd.weight"
                self.get_parameter(name).data.copy_(tensor * (tensor.max().item() if asks else 1))

    state = nn.Module.state_dict(Deep())
    plan = hw.trace(Deep(), hw.open(state).manifest)
    (line,) = plan.graph_breaks
    assert {*line.sources, *line.with_them} == {*plan.fallback}
    assert len(plan.fallback) == 8  # Breaks in two layers that are not alike.
    report = hw.load(Deep(), state)
    assert report.fell_back == (str(line),)
    assert all(name in report.fell_back[0] for name in plan.fallback)
    assert "layers.1.asked.bias" in plan.explain("layers.1.asked.bias")


def test_layers_that_differ_by_their_number_are_left_out_together(monkeypatch):
    """Else the next run would stop at the next layer, and there may be a hundred."""
    records, record = [], leave_out.record

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Asking() for _ in range(9))

        def load_weights(self, pairs):
            for name, tensor in pairs:
                scale = tensor.max().item() if name.endswith("asked.weight") else 1
                self.get_parameter(name).data.copy_(tensor * scale)

    def counted(*args, **kwargs):
        records.append(kwargs["leave_out"])
        return record(*args, **kwargs)

    monkeypatch.setattr(leave_out, "record", counted)
    plan = hw.trace(Deep(), {name: torch.ones(value.shape) for name, value in Deep().state_dict().items()})
    assert set(plan.fallback) == {name for name in Deep().state_dict() if ".asked." in name}
    assert len(records) == 4  # two runs, and two that see whether what is left out can be loaded apart


class Rebinding(nn.Module):
    """Its loading code gives a module a new parameter, and a parameter a gradient, which nobody is seen to give."""

    def __init__(self):
        super().__init__()
        self.plain, self.buffered = nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, affine=False)

    def load_weights(self, pairs):
        for name, tensor in pairs:
            if name == "plain.weight":
                self.plain.weight = nn.Parameter(tensor * 2, requires_grad=False)
            else:
                self.get_buffer(name).copy_(tensor)
        self.buffered.register_buffer("running_mean", self.buffered.running_mean + 1)
        self.plain.requires_grad_(True)


def test_the_line_that_rebinds_is_told_and_not_the_caller_s():
    plan = hw.trace(Rebinding(), nn.Module.state_dict(Rebinding()))
    first = Rebinding.load_weights.__code__.co_firstlineno
    lines = {line.what: line.where for line in plan.graph_breaks}
    assert lines["rebinding plain.weight"] == f"{__file__}:{first + 3}"
    assert lines["rebinding buffered.running_mean"] == f"{__file__}:{first + 6}"


def test_a_line_that_nobody_knows_is_called_unknown():
    class Gradient(nn.Linear):
        def load_weights(self, pairs):
            for name, tensor in pairs:
                self.get_parameter(name).data.copy_(tensor)
            self.weight.requires_grad_(False)

    plan = hw.trace(Gradient(2, 2), nn.Module.state_dict(nn.Linear(2, 2)))
    assert {line.where for line in plan.graph_breaks} == {"an unknown line of Gradient's loading code"}


@pytest.mark.parametrize("load", [hw.load, lambda model, *args, **kwargs: hw.LiveModel(model).load(*args, **kwargs)])
def test_a_report_says_what_went_to_the_model_s_own_code_and_was_not_proven(load):
    report = load(Rebinding(), nn.Module.state_dict(Rebinding()), verify="loader")
    assert report.proven == 0
    (warning,) = [warning for warning in report.warnings if "proven" in warning]
    assert warning.startswith('verify="loader": proven 0 of 4 tensors of the model; the rest was loaded by')
    assert "all 4 tensors were given to the model's own loading code" in str(report)
    report = load(Asking(), nn.Module.state_dict(Asking()), verify="loader")
    assert "proven 2 of 4 tensors" in str(report)
    assert "2 of these 4 tensors were given to the model's own loading code" in str(report)
