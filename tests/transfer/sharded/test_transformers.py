"""Models of transformers: Llama by FSDP2 and by tensor parallel ranks, Mixtral by expert parallel ranks."""

import pytest
import torch
import torch.distributed as dist
from ends import receiver
from processes import Child
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import hotweights as hw
from hotweights.model.as_saved import as_saved

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and transformers' own

SIZES = {
    "vocab_size": 101,  # uneven on four ranks
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(seed):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def mixtral(seed):
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config).eval()


def given(kind, rank):
    """What a rank sends."""
    if kind == "experts":  # The names of the checkpoint; each rank has its experts, and all have the rest.
        saved = as_saved(mixtral(seed=1))
        assert any(".experts.3." in name for name in saved)
        return {
            name: tensor for name, tensor in saved.items() if ".experts." not in name or f".experts.{rank}." in name
        }
    model = llama(seed=1)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (4,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for layer in model.model.layers:
        columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        plan = dict.fromkeys(columns, ColwiseParallel()) | {
            "self_attn.o_proj": RowwiseParallel(),
            "mlp.down_proj": RowwiseParallel(),
        }
        parallelize_module(layer, mesh["tensor"], plan)
        fully_shard(layer, mesh=mesh["data"])
    return model  # What was not sharded lies on every rank.


def _sends(rank, address):
    with hw.Sender(address, group=dist.group.WORLD, receivers=2, timeout=30) as sending:
        for kind in ("fsdp", "fsdp x tp", "experts"):
            sending.send(given(kind, rank), version=kind)


def _serves(pipe, address):
    torch.manual_seed(0)
    ids = torch.randint(101, (1, 7))
    llamas, mixtrals = hw.LiveModel(llama(seed=2)), hw.LiveModel(mixtral(seed=2))
    with receiver(address, timeout=30, offer_timeout=30) as source, torch.inference_mode():
        llamas.load(source)
        pipe.send(same(llamas.model, llama(seed=1), ids))
        llamas.update(source)
        pipe.send(same(llamas.model, llama(seed=1), ids))
        mixtrals.load(source)
        pipe.send(same(mixtrals.model, mixtral(seed=1), ids))


def same(model, wanted, ids):
    state = wanted.state_dict()
    held = model.state_dict()
    return (
        held.keys() == state.keys()
        and all(torch.equal(held[name], state[name]) for name in state)
        and torch.equal(model(ids).logits, wanted(ids).logits)
    )


def test_transformers_models_arrive_from_sharded_ranks(tmp_path, address):
    (tmp_path / "ranks").mkdir()
    for kind in (llama, mixtral):  # Their code is imported before the ranks are forked.
        kind(seed=0)
    with Child(_serves, address) as one, Child(_serves, address) as other:
        on_ranks(tmp_path / "ranks", _sends, address, count=4)
        assert [worker.heard() for worker in (one, other) for _ in range(3)] == [True] * 6
