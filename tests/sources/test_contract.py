"""Every source against the public contract."""

import pytest
import torch

import hotweights as hw
from hotweights.testing import SOURCE_CONTRACT, write_checkpoint

TENSORS = {
    "embed.weight": torch.randn(33, 17),
    "layers.0.weight": torch.randn(40, 1000).to(torch.bfloat16),
    "three": torch.arange(3, dtype=torch.uint8),  # puts every tensor behind it off its alignment
    "layers.1.weight": torch.randn(64, 64),
    "scale": torch.tensor(3.0),
    "empty": torch.empty(0, 7),
    "counts": torch.arange(-5, 5),
    "flags": torch.tensor([True, False, True]),
    "fp8": torch.randn(16).to(torch.float8_e4m3fn),
    "complex": torch.randn(3, dtype=torch.complex64),
}


def strided():
    wide = torch.randn(8, 12)
    return {"t": wide.t(), "columns": wide[:, ::2], "expanded": torch.randn(1, 4).expand(3, 4), "scalar": wide[2, 3]}


@pytest.fixture(params=["file", "shards", "mapping", "strided mapping", "module"])
def case(request, tmp_path):
    """What makes a source, and what it holds."""
    if request.param == "file":
        path = write_checkpoint(tmp_path, TENSORS) / "model.safetensors"
        return lambda: hw.open(path), TENSORS
    if request.param == "shards":
        write_checkpoint(tmp_path, TENSORS, shards=3)
        return lambda: hw.open(tmp_path), TENSORS
    if request.param == "module":
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        return lambda: hw.open(module), dict(module.state_dict())
    tensors = TENSORS if request.param == "mapping" else strided()
    return lambda: hw.open(tensors), tensors


@pytest.mark.parametrize("check", SOURCE_CONTRACT, ids=lambda check: check.__name__)
def test_contract(check, case):
    check(*case)
