"""Ranks whose models are wrapped take versions by every road, with other names and other dtypes at once."""

import pytest
import torch
from ends import Thread, receiver, sender
from ranks import on_ranks, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import hotweights as hw
from hotweights.testing import write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, peft's and DDP's own, in the ranks too


class Network(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.odd, self.norm = nn.Linear(8, 6), nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, tensor):
        return self.norm(self.odd(self.up(tensor)))


def adapted(model):
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))


def sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(next(part for name, part in model.named_modules() if name.endswith("up")), mesh=mesh)
    return fully_shard(model, mesh=mesh)


KINDS = {
    "peft": adapted,
    "ddp": DistributedDataParallel,
    "fsdp2": sharded,
    "ddp of peft": lambda model: DistributedDataParallel(adapted(model)),
    "fsdp2 of peft": lambda model: sharded(adapted(model)),
}


def version(seed):
    """A trainer's float32, under names of its own."""
    return {f"trainer.{name}": tensor.detach() for name, tensor in Network(seed).state_dict().items()}


def check(model, seed):
    held = {
        name.replace("base_model.model.", "").replace("module.", "").replace("base_layer.", ""): whole(tensor)
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }
    wanted = Network(seed).bfloat16().state_dict()
    assert held.keys() == wanted.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in wanted.items())


def adapters(model):
    return {name: whole(tensor).clone() for name, tensor in model.state_dict().items() if "lora_" in name}


def _follows(rank, kind, path, address, atomic):
    model = KINDS[kind](Network().bfloat16())
    before = adapters(model)
    rename = {"trainer.": ""}
    live = hw.LiveModel(model, atomic=atomic)
    with pytest.raises(hw.PlanError, match='cast="floats" allows it'):
        live.load(path, rename=rename, allow_missing="*lora_*")
    live.load(path, rename=rename, cast="floats", allow_missing="*lora_*")
    check(model, 1)
    live.update(version(2), rename=rename)
    check(model, 2)
    with live.begin(rename=rename) as update:
        update.feed(version(3))
        update.commit()
    check(model, 3)
    with live.begin(hw.open(version(4)).manifest, rename=lambda name: name.removeprefix("trainer.")) as update:
        update.feed(version(4).items())
        update.commit()
    check(model, 4)

    versions = {seed: version(seed) for seed in (5, 6)}  # Not in the thread: all threads share torch's generator.

    def send():
        with sender(address, receivers=2) as sending:
            for seed, tensors in versions.items():
                sending.send(tensors, version=seed)

    sending = Thread(send) if rank == 0 else None
    with receiver(address) as source:
        for seed in (5, 6):
            report = live.update(source, rename=rename)
            assert {*report.casts.values()} == {"F32 -> BF16"}
            check(model, seed)
    if sending is not None:
        sending.result()
    live.update(model.state_dict())
    check(model, 6)
    assert adapters(model).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapters(model).items())
    return live.version


@pytest.mark.parametrize("atomic", ["staged", pytest.param("journal", marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_road_with_other_names_and_dtypes(kind, atomic, tmp_path, address):
    if "peft" in kind:
        pytest.importorskip("peft")
    path = write_checkpoint(tmp_path / "first", version(1))
    on_ranks(tmp_path, _follows, kind, path, address, atomic)
