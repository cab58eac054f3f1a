"""Sources that decide with a group and can be asked for any bytes, as the ranks of an engine read files."""

from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hotweights as hw


class Composed(nn.Module):
    """One write reads what another wrote, as vLLM's Mamba mixers load ``A``."""

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(8))

    def load_weights(self, pairs):
        for _, tensor in pairs:
            self.A.data.copy_(tensor)
            self.A.data.copy_(-torch.exp(self.A.float()))


class Together:
    """Files, and a group that says yes or no."""

    def __init__(self, source, answer):
        self._source, self._answer = source, answer
        self.refused = []

    def __getattr__(self, name):
        return getattr(self._source, name)

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
    with hw.open(two) as source:
        live.update(Together(source, True))
    assert torch.equal(model.A, second)


def test_a_group_that_says_no(tmp_path):
    one, first = written(tmp_path / "one.safetensors", 1)
    two, _ = written(tmp_path / "two.safetensors", 2)
    model = Composed()
    live = hw.LiveModel(model)
    live.load(one)
    with hw.open(two) as source, pytest.raises(hw.UpdateAborted, match="another rank cannot"):
        live.update(Together(source, False))
    assert torch.equal(model.A, first)
