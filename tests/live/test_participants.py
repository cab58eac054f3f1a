"""Sources that decide with a group and can be asked for any bytes, as the ranks of an engine read files."""

from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hotweights as hw
from hotweights.sources import FileSource


class Composed(nn.Module):
    """One write reads what another wrote, as vLLM's Mamba mixers load ``A``."""

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(8))

    def load_weights(self, pairs):
        for _, tensor in pairs:
            self.A.data.copy_(tensor)
            self.A.data.copy_(-torch.exp(self.A.float()))


class Together(FileSource):
    """Files, and a group that says yes or no."""

    def __init__(self, path, answer):
        super().__init__(path)
        self._answer = answer
        self.refused = []

    def wanted(self, wishes):
        raise AssertionError("it is asked for what is wanted")

    @contextmanager
    def decision(self):
        if not self._answer:
            raise RuntimeError("another rank cannot")
        yield

    def refuse(self, error):
        self.refused.append(error)


def written(path, seed):
    values = torch.rand(8, generator=torch.Generator().manual_seed(seed))
    save_file({"A_log": values}, path)
    return path, -values.exp()


@pytest.mark.parametrize("atomic", ["staged", "journal", False])
def test_each_step_is_done_once(tmp_path, atomic):
    one, first = written(tmp_path / "one.safetensors", 1)
    two, second = written(tmp_path / "two.safetensors", 2)
    model = Composed()
    live = hw.LiveModel(model, atomic=atomic)
    live.load(one)
    assert torch.equal(model.A, first)
    with Together(two, True) as source:
        live.update(source)
    assert torch.equal(model.A, second)


def test_a_group_that_says_no(tmp_path):
    one, first = written(tmp_path / "one.safetensors", 1)
    two, _ = written(tmp_path / "two.safetensors", 2)
    model = Composed()
    live = hw.LiveModel(model)
    live.load(one)
    with Together(two, False) as source, pytest.raises(hw.UpdateAborted, match="another rank cannot"):
        live.update(source)
    assert torch.equal(model.A, first)
