"""Live models of transformers' families, as they are and in int8, from what ``save_pretrained`` wrote."""

import pytest
import torch
import whole

import hotweights as hw
from hotweights.engines.torchao import quantise

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and torchao's own

NARROW = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**NARROW, "vocab_size": 32}
ENCODER_DECODER = {f"{side}_{part}": 1 for side in ("encoder", "decoder") for part in ("layers", "attention_heads")}
ENCODER_DECODER |= {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 32}
FAMILIES = {
    "GPT2LMHeadModel": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 16},  # Conv1D
    "T5ForConditionalGeneration": {  # one embedding under three names
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "vocab_size": 32,
        "decoder_start_token_id": 0,
    },
    "MixtralForCausalLM": {**TEXT, "num_key_value_heads": 1, "num_local_experts": 4},  # experts in stacks
    "Qwen3MoeForCausalLM": {
        **TEXT,
        "num_key_value_heads": 1,
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
    },
    "MambaForCausalLM": {**TEXT, "state_size": 4, "time_step_rank": 4},
    "WhisperForConditionalGeneration": {
        **ENCODER_DECODER,
        "max_source_positions": 8,
        "max_target_positions": 8,
        "num_mel_bins": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
    "Wav2Vec2Model": {  # weight_norm, a parametrization
        **TEXT,
        "conv_dim": (8, 8),
        "conv_stride": (2, 2),
        "conv_kernel": (3, 3),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    },
    "ResNetModel": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},  # BatchNorm's buffers
}


def made(family):
    kind = getattr(transformers, family)
    return kind(kind.config_class(**FAMILIES[family])).eval()


def saved(family, seed, path):
    model, chance = made(family), torch.Generator().manual_seed(seed)
    for one in model.parameters():
        one.data.copy_(torch.rand(one.shape, generator=chance))
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_is_a_cold_load(tmp_path, family, int8):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    paths = [saved(family, seed, tmp_path / str(seed)) for seed in range(2)]
    expected = []
    for path in paths:
        cold = getattr(transformers, family).from_pretrained(path)
        if int8:
            quantize_(cold, Int8WeightOnlyConfig())
        expected.append(whole.values(cold))
    model = made(family)
    live = hw.LiveModel(model, process=quantise() if int8 else None)
    live.load(paths[0])
    where = whole.addresses(model)
    assert whole.values(model) == expected[0]
    for number, atomic in ((1, "staged"), (0, "journal"), (1, False)):
        live.update(paths[number], atomic=atomic)
        assert whole.values(model) == expected[number]
        assert whole.addresses(model) == where
