"""Quantising online from bf16 files, and reloading what was quantised already."""

import pytest
import torch

import hotweights as hw
from hotweights.testing import Processed, processed_checkpoint, write_checkpoint

KINDS = ["fp8", "scaled pair", "plain"]


def half(seed):
    tensors = processed_checkpoint(KINDS, seed=seed)
    return {name: one.bfloat16() if one.is_floating_point() else one for name, one in tensors.items()}


def cold(seed):
    model = Processed(KINDS).bfloat16()
    model.load_state_dict(half(seed), strict=False)
    model.process()
    return model


@pytest.mark.parametrize("atomic", ["journal", "staged", False])
def test_from_files(tmp_path, atomic):
    model = Processed(KINDS).bfloat16()
    live = hw.LiveModel(model, atomic=atomic)
    live.load(write_checkpoint(tmp_path / "0", half(0)), allow_missing=model.allow_missing)
    where = {name: one.data_ptr() for name, one in model.named_parameters()}
    for seed in (1, 2):
        live.update(write_checkpoint(tmp_path / str(seed), half(seed)))
        expected = dict(cold(seed).named_parameters())
        for name, one in model.named_parameters():
            assert one.dtype is expected[name].dtype
            assert torch.equal(one.float(), expected[name].float()), name
            assert one.data_ptr() == where[name]
    assert model.layers[0].weight.dtype is torch.float8_e4m3fn
    assert model.layers[1].input_scale == 0.5  # no file brings it: it is what processing gave it
