"""What is sent of a transformers model is what it saves."""

import pytest
import torch

import hotweights as hw
from hotweights.model.as_saved import as_saved

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
DEEPSEEK = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_nope_head_dim": 8,
}


@pytest.mark.parametrize("wrapped", [False, True])
def test_experts_have_the_names_of_a_checkpoint(wrapped, tmp_path):
    model = transformers.AutoModelForCausalLM.from_config(transformers.DeepseekV3Config(**TINY, **DEEPSEEK))
    model.save_pretrained(tmp_path)
    saved = as_saved(torch.nn.DataParallel(model) if wrapped else model)
    assert "model.layers.1.mlp.experts.gate_up_proj" not in saved
    with hw.open(tmp_path) as source:
        expected = dict(source.tensors())
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    assert not any(tensor.requires_grad for tensor in saved.values())


def test_others_are_sent_as_they_are():
    llama = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**TINY))
    linear = torch.nn.Linear(2, 2)
    assert as_saved(llama) is llama
    assert as_saved(linear) is linear
