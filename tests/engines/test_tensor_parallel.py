"""transformers' tensor parallel models take whole checkpoints: bit for bit what ``from_pretrained`` makes of them."""

import os

import pytest
import torch
from ranks import on_ranks

import hotweights as hw

transformers = pytest.importorskip("transformers")

_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 48,
}


def here(model):
    tensors = model.state_dict(keep_vars=True)
    return {name: getattr(tensor, "_local_tensor", tensor).detach() for name, tensor in tensors.items()}


def _loads(rank, path):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, tp_plan="auto")
    wanted = {name: tensor.clone() for name, tensor in here(model).items()}
    for tensor in here(model).values():
        tensor.fill_(7)
    report = hw.load(model, path)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in here(model).items())
    return report.bytes_written, sum(tensor.nbytes for tensor in wanted.values())


@pytest.mark.parametrize("kind", ["Llama", "Mixtral"])  # names alone; experts that are stacked, gate and up interleaved
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_parallel_model_takes_a_whole_checkpoint(kind, tmp_path):
    more = {"num_local_experts": 4} if kind == "Mixtral" else {}
    config = getattr(transformers, f"{kind}Config")(**_SIZES, **more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.save_pretrained(tmp_path / "model")
    nbytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    for written, held in on_ranks(tmp_path, _loads, tmp_path / "model"):
        assert written == held < nbytes
