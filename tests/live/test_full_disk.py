"""A disk that is full: what cannot be written says which file, leaves no piece of a plan, and costs no weights."""

import contextlib
import logging
import resource
import signal

import pytest
import torch
from torch import nn

import hotweights as hw


class Model(nn.Module):
    """Enough tensors for a plan that does not fit into a thousand bytes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(40))


def version_of(number):
    return {name: torch.full_like(tensor, float(number)) for name, tensor in Model().state_dict().items()}


@contextlib.contextmanager
def no_room(nbytes=1000):
    """Inside, no file of this process grows beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # Then writing fails, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_plan_that_cannot_be_kept_costs_no_load_and_the_log_names_the_file(tmp_path, caplog):
    model = Model()
    with no_room(), caplog.at_level(logging.WARNING, "hotweights"):
        hw.load(model, version_of(3), cache=True, cache_dir=tmp_path)
        (record,) = caplog.records
    assert {tensor.unique().item() for tensor in model.state_dict().values()} == {3.0}
    assert record.getMessage().startswith("a plan is not kept for other processes; give cache_dir= a folder: ")
    assert str(tmp_path) in record.getMessage()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_plan_that_cannot_be_saved_names_the_file_and_leaves_the_one_before(tmp_path):
    plan = hw.trace(Model(), hw.open(version_of(1)).manifest)
    path = tmp_path / "model.plan"
    plan.save(path)
    before = path.read_bytes()
    with no_room(), pytest.raises(OSError, match=r"model\.plan"):
        plan.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.plan"]
    assert path.read_bytes() == before


def test_a_timeline_that_cannot_be_written_names_the_file_and_the_model_serves(tmp_path):
    live = hw.LiveModel(Model())
    live.load(version_of(1), version=1)
    report = live.update(version_of(2), version=2)
    with no_room(100), pytest.raises(OSError, match=r"t\.json"):
        report.save_timeline(tmp_path / "t.json")
    with live.serving() as version:
        assert version == 2


def test_a_checkpoint_that_cannot_be_saved_names_its_place_and_the_model_serves(tmp_path):
    live = hw.LiveModel(Model())
    live.load(version_of(1), version=1)
    with no_room(), pytest.raises(hw.SaveError, match="step-1"):
        hw.save(live.model, tmp_path / "step-1")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with live.serving() as version:
        assert version == 1
