"""Odd arguments: the error is ours, says what was expected and what was found, and the model is unharmed."""

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights import LoadPlan, Pool, UnknownName, UsageError
from hotweights.testing import assert_same_bits, write_checkpoint

STATE = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}

OPTIONS = [
    ({"plan": "x"}, r"plan= is a LoadPlan \(LoadPlan.load reads one from a file\); found 'x'"),
    ({"pool": 5}, "pool= is a Pool; found 5"),
    ({"device": "nonsense"}, "device='nonsense' is no device that can be used here: Expected one of cpu, cuda"),
    ({"device": 5.5}, "device=5.5 is no device"),
    ({"device": "meta"}, "on 'meta' they would not be"),
    ({"order": "x"}, "unknown order 'x'; known are: file, given, layer"),
    ({"order": []}, "unknown order \\[\\]"),
    ({"io": "x"}, "unknown io 'x'; known are: auto, buffered, direct"),
    ({"verify": "x"}, "unknown verify 'x'; known are: loader, off"),
    ({"cast": "x"}, "unknown cast 'x'; known are: error, floats, loader"),
    ({"threads": 0}, "threads= is a whole number of at least 1; found 0"),
    ({"threads": "2"}, "threads= is a whole number of at least 1; found '2'"),
    ({"threads": True}, "threads= is a whole number of at least 1; found True"),
    ({"cache_dir": 5}, "cache_dir= is a path; found 5"),
    ({"allow_missing": 5}, "allow_missing= is a pattern of names, or several; found 5"),
    ({"allow_unexpected": ["a", None]}, "allow_unexpected= is a pattern of names, or several; found None"),
]


@pytest.mark.parametrize("kind", ["memory", "file"])
@pytest.mark.parametrize(
    ("options", "words"), OPTIONS, ids=lambda option: str(option) if isinstance(option, dict) else ""
)
def test_options_of_load(options, words, kind, tmp_path):
    model = nn.Linear(2, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError, match=words):
        hw.load(model, STATE if kind == "memory" else write_checkpoint(tmp_path, STATE), **options)
    assert_same_bits(model.state_dict(), before)


@pytest.mark.parametrize(
    "options", [option for option, _ in OPTIONS if option.keys() & {"device", "cast", "allow_missing"}], ids=str
)
def test_options_of_trace(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        hw.trace(nn.Linear(2, 2), STATE, **options)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_models_that_are_none(tmp_path):
    path = write_checkpoint(tmp_path, STATE)
    linear = nn.Linear(2, 2)
    for act in (hw.load, hw.trace):
        with pytest.raises(UsageError, match="found None"):
            act(None, STATE)
        with pytest.raises(UsageError, match=r"found <class '.*Linear'>$"):
            act(nn.Linear, STATE)
        for source in (path, str(path), STATE):
            with pytest.raises(
                UsageError, match=r"torch\.nn\.Module; found .*; the model comes first, then the source"
            ):
                act(source, linear)
        for scripted in (torch.jit.script(linear), torch.jit.trace(linear, torch.zeros(1, 2))):
            before = scripted.weight.clone()
            with pytest.raises(UsageError, match=r"a TorchScript module.*load the module that it was made from"):
                act(scripted, path)
            assert torch.equal(scripted.weight, before)


def test_what_trace_takes(tmp_path):
    """Whatever ``load`` takes, and a manifest."""
    path = write_checkpoint(tmp_path, STATE)
    source = nn.Linear(2, 2)
    with hw.open(path) as opened:
        for given in (opened.manifest, opened, path, str(path), STATE, source):
            plan = hw.trace(nn.Linear(2, 2), given)
            assert plan.manifest == opened.manifest
            assert isinstance(plan.manifest, hw.Manifest)
        assert len(list(opened.tensors())) == 2, "it was closed"
    with pytest.raises(UsageError, match="a source is a path"):
        hw.trace(nn.Linear(2, 2), 5)


def test_patterns_that_can_be_read_once():
    model = nn.Linear(2, 2)
    hw.load(model, {"weight": STATE["weight"]}, allow_missing=(name for name in ["bias"]))
    plan = hw.trace(model, {"weight": STATE["weight"]}, allow_missing=(name for name in ["bias"]))
    assert isinstance(plan, LoadPlan)


def test_unknown_names_are_value_errors_too():
    with pytest.raises(ValueError, match="known are"):
        hw.load(nn.Linear(2, 2), STATE, order="x")
    with Pool() as pool:
        hw.load(nn.Linear(2, 2), STATE, pool=pool, plan=None, order="layer", threads=1, device="cpu")
    assert issubclass(UnknownName, UsageError)
