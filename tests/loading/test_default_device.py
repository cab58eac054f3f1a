"""A default device that the caller has set is his code's: memory of ours lies where we said."""

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.testing import Processed, processed_checkpoint, write_checkpoint

KINDS = ["transposed", "derived", "hidden", "fp8", "attention"]


@pytest.fixture(autouse=True)
def _elsewhere():
    with torch.device("meta"):  # On an accelerator the host's copy would lie there, and nothing would fail.
        yield


@pytest.fixture
def model():
    with torch.device("cpu"):
        return Processed(KINDS)


def tensors(seed):
    with torch.device("cpu"):
        return processed_checkpoint(KINDS, seed=seed)


def by_mapping(live, new, directory):
    live.update(new)


def by_files(live, new, directory):
    live.update(write_checkpoint(directory, new))


def by_pushes(live, new, directory):
    with live.begin() as update:
        update.feed(new)
        update.commit()


@pytest.mark.parametrize("road", [by_mapping, by_files, by_pushes])
@pytest.mark.parametrize("atomic", ["journal", "staged", False])
def test_a_live_model_is_updated(model, tmp_path, atomic, road):
    def process(layer):
        with torch.device("cpu"):
            layer.process() if hasattr(layer, "process") and layer is not model else None

    live = hw.LiveModel(model, process=process, deferred=model.deferred, atomic=atomic)
    live.load(tensors(0), allow_missing=model.allow_missing)
    digest = live.digest()
    road(live, tensors(1), tmp_path / "1")
    assert live.digest() != digest
    road(live, tensors(0), tmp_path / "0")
    assert live.digest() == digest


class Fused(nn.Module):
    """Programs, overlaps and constants."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4))
        self.register_buffer("column", self.weight.data[:, 1], persistent=False)

    def load_weights(self, pairs):
        for _, tensor in pairs:
            self.weight.data[:2].copy_(-tensor.exp())
            self.weight.data[2:].fill_(1)


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_a_model_is_loaded(tmp_path, io):
    with torch.device("cpu"):
        model, path = Fused(), write_checkpoint(tmp_path / "x", {"a": torch.zeros(2, 4)})
    hw.load(model, path, io=io, verify="loader")
    assert model.weight.tolist() == [[-1.0] * 4] * 2 + [[1.0] * 4] * 2
    with hw.open(path) as source:
        assert [tensor.device.type for _, tensor in source.tensors()] == ["cpu"]
