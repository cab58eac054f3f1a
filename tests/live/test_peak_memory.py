"""Memory of an update: one layer in both formats at a time, whatever the road; counted by what is allocated."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import hotweights as hw
from hotweights.memory import host
from hotweights.testing import write_checkpoint

LAYERS = 5


def tensors(seed):
    made = torch.Generator().manual_seed(seed)
    return {f"{number}.weight": torch.rand(8, 8, generator=made) for number in range(LAYERS)}


class Count:
    """Storages that an update took and that are still alive."""

    def __init__(self):
        self.kept = []

    def add(self, tensor):
        self.kept.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    @property
    def alive(self):
        return sum(not one.expired() for one in self.kept)


def by_mapping(live, new, directory):
    live.update(new)


def by_files(live, new, directory):
    live.update(write_checkpoint(directory, new))


def by_pushes(live, new, directory):
    with live.begin() as update:
        update.feed(new)
        update.commit()


def by_stream(live, new, directory):
    live.update(hw.from_iterator(new.items(), manifest=hw.open(new).manifest))


@pytest.mark.parametrize("road", [by_mapping, by_files, by_pushes, by_stream])
@pytest.mark.parametrize("atomic", ["journal", "staged", False])
def test_one_layer_in_both_formats(monkeypatch, tmp_path, atomic, road):
    scratch, made, seen = Count(), Count(), []

    def taken(*args):
        seen.append((scratch.alive, made.alive))
        return scratch.add(real(*args))

    def process(layer):
        seen.append((scratch.alive, made.alive))
        layer.weight = nn.Parameter(made.add(layer.weight.t().to(torch.bfloat16).contiguous()), requires_grad=False)

    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(LAYERS)))
    live = hw.LiveModel(model, process=process, atomic=atomic)
    live.load(tensors(0))
    real = host.scratch
    monkeypatch.setattr(host, "scratch", taken)
    made.kept.clear()
    seen.clear()
    road(live, tensors(1), tmp_path / "new")
    assert seen == [(0, 0), (1, 0)] * LAYERS  # when it is opened, and when it is processed
    assert scratch.alive == made.alive == 0
    assert torch.equal(model[4].weight, tensors(1)["4.weight"].t().to(torch.bfloat16))


@pytest.mark.parametrize("atomic", ["journal", "staged"])
def test_the_copy_is_of_what_is_live_and_taken_once(monkeypatch, atomic):
    """One copy of the model in kernel format: half of what the checkpoint takes, here."""
    copies, real = [], host.host_copy
    monkeypatch.setattr(host, "host_copy", lambda nbytes, device: copies.append(nbytes) or real(nbytes, device))

    def process(layer):
        layer.weight = nn.Parameter(layer.weight.to(torch.bfloat16), requires_grad=False)

    live = hw.LiveModel(nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(LAYERS))), process=process)
    live.load(tensors(0))
    for seed in (1, 2):
        report = live.update(tensors(seed), atomic=atomic)
    assert sum(copies) == report.copy_bytes == LAYERS * 8 * 8 * 2
    assert report.peak_scratch_bytes == 8 * 8 * 4
