"""Ranks: saved by four, loaded by two; each reads its own slices, and no more."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from dcp_saved import load_dcp
from ranks import on_ranks, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import hotweights as hw


class Net(nn.Module):
    """Even and uneven rows, fewer rows than ranks, a buffer, and rows that are long enough to be read one by one."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(64, 1024, bias=False)
        self.down = nn.Linear(1024, 64, bias=False)
        self.odd = nn.Linear(30, 7)
        self.one = nn.Parameter(torch.randn(1, 3))
        self.register_buffer("steps", torch.randn(3))

    def forward(self, hidden):
        return self.odd(self.down(self.up(hidden))[:, :30]).sum() + self.one.sum()


def sharded(kind, count, seed):
    model = Net(seed)
    shape = {"fsdp": (count,), "tp": (count,), "fsdp x tp": (2, count // 2), "hsdp": (2, count // 2)}[kind]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])
    if "tp" in kind:
        inner = mesh if len(shape) == 1 else mesh["b"]
        parallelize_module(model, inner, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if kind != "tp":
        fully_shard(model, mesh=mesh["a"] if kind == "fsdp x tp" else mesh)
    return model


def _saves(rank, kind, folder, count, parts):
    model = sharded(kind, count, seed=1)
    if parts:
        dcp.save(model.state_dict(), storage_writer=dcp.HuggingFaceStorageWriter(folder, save_distributed=True))
        return {name: whole(tensor) for name, tensor in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), foreach=False)
    model(torch.ones(2, 64)).backward()
    optimiser.step()
    states = dict(zip(("model", "optim"), get_state_dict(model, optimiser), strict=True))
    dcp.save(states | {"step": 3}, checkpoint_id=folder)
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def _loads(rank, kind, folder, count, saved):
    model = sharded(kind, count, seed=2)
    here = {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }
    report = hw.load(model, folder)
    assert all(torch.equal(whole(tensor), saved[name]) for name, tensor in model.state_dict().items())
    live = hw.LiveModel(sharded(kind, count, seed=3))
    live.load(folder)
    live.update(folder)
    assert all(torch.equal(whole(tensor), saved[name]) for name, tensor in live.model.state_dict().items())
    return report.bytes_read, sum(tensor.nbytes for tensor in here.values())


@pytest.mark.parametrize(("kind", "parts"), [("fsdp", False), ("fsdp x tp", True)])
def test_saved_by_four_and_loaded_by_two(tmp_path, kind, parts):
    check_each(tmp_path, kind, ["fsdp"], parts)


@pytest.mark.long
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("kind", ["fsdp", "tp", "fsdp x tp", "hsdp"])
def test_every_mesh(tmp_path, kind, parts):
    check_each(tmp_path, kind, ["fsdp", "tp"], parts)


def check_each(tmp_path, kind, by, parts):
    """``parts``: in safetensors, of each rank its own."""
    folder = tmp_path / "step-3"
    saved = on_ranks(tmp_path, _saves, kind, str(folder), 4, parts, count=4)[0]
    for loaded in by:
        for read, here in on_ranks(tmp_path, _loads, loaded, str(folder), 2, saved):
            assert read == here  # Its slices, and not a byte more.
    plain = Net(0)
    report = hw.load(plain, folder, verify="loader")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in plain.state_dict().items())
    assert report.bytes_read >= sum(tensor.nbytes for tensor in saved.values())
    if parts:
        return
    theirs = load_dcp(folder, {f"model.{name}": tensor for name, tensor in saved.items()})
    assert all(torch.equal(theirs[f"model.{name}"], tensor) for name, tensor in plain.state_dict().items())


def _saves_without_waiting(rank, folder):
    model = sharded("fsdp", 2, seed=1)
    dcp.async_save({"model": model.state_dict()}, checkpoint_id=folder).result()
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def test_saved_asynchronously(tmp_path):
    saved = on_ranks(tmp_path, _saves_without_waiting, str(tmp_path / "ck"))[0]
    hw.load(plain := Net(0), tmp_path / "ck")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in plain.state_dict().items())
