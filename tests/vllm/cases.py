"""Tiny models of every kind that is tried with the engine, as checkpoints with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_BASE: dict[str, Any] = {
    "vocab_size": 1000,  # No multiple of 64: engines pad it.
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
_MOE = {**_BASE, "head_dim": 64, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
_MAMBA = {"vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 3, "initializer_range": 0.2}


def _as_it_is(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    return tensors


def _int8(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """As compressed-tensors writes it: int8 by channel, activations quantised as they come."""
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "token",
                    "dynamic": True,
                },
            }
        },
    }
    made = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            scale = tensor.float().abs().amax(1, keepdim=True) / 127
            made[name] = (tensor.float() / scale).round().to(torch.int8)
            made[name + "_scale"] = scale
        else:
            made[name] = tensor
    return made


def _w4a16(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """As compressed-tensors packs 4 bits. Each part of a fused layer brings its shape, and they differ."""
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 128,
                    "dynamic": False,
                },
            }
        },
    }
    made = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            rows, columns = tensor.shape
            made[name + "_packed"] = torch.randint(-(2**31), 2**31 - 1, (rows, columns // 8), dtype=torch.int32)
            made[name + "_scale"] = tensor[:, ::128].abs() * 0.1 + 0.01
            made[name + "_shape"] = torch.tensor([rows, columns])
        else:
            made[name] = tensor
    return made


@dataclass(frozen=True)
class Case:
    """One kind of model.

    Attributes:
        config: the class in transformers.
        options: for its constructor.
        engine: what the engine is started with besides.
        embedding: what its embedding is multiplied by; Gemma's would drown the layers, and each token follow itself.
        convert: makes other tensors of those that transformers saves, and may add to the config.
    """

    config: str
    options: Mapping[str, Any]
    engine: Mapping[str, Any] = field(default_factory=dict)
    embedding: float = 1.0
    convert: Callable[[dict[str, torch.Tensor], dict[str, Any]], dict[str, torch.Tensor]] = _as_it_is


_QWEN = {**_BASE, "head_dim": 64}
_TORCHAO = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}

CASES = {
    "llama": Case("LlamaConfig", _BASE),
    "qwen3": Case("Qwen3Config", _QWEN),
    "qwen3-tied": Case("Qwen3Config", {**_QWEN, "tie_word_embeddings": True}),
    "mixtral": Case("MixtralConfig", {**_BASE, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3-moe": Case("Qwen3MoeConfig", {**_MOE, "decoder_sparse_step": 1, "norm_topk_prob": True}),
    "gpt-oss": Case(
        "GptOssConfig",
        {**_QWEN, "intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gemma3": Case(
        "Gemma3TextConfig",
        {**_QWEN, "sliding_window": 64, "tie_word_embeddings": True},
        embedding=0.05,
    ),
    "mamba2": Case(
        "Mamba2Config", {**_MAMBA, "num_heads": 8, "head_dim": 64, "state_size": 32, "n_groups": 2, "expand": 2}
    ),
    "nemotron-h": Case(
        "NemotronHConfig",
        {
            **_MAMBA,
            "layers_block_type": ["linear_attention", "mlp", "full_attention"],
            "intermediate_size": 512,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "mamba_num_heads": 8,
            "mamba_head_dim": 64,
            "ssm_state_size": 32,
            "n_groups": 2,
        },
    ),
    "int8": Case("LlamaConfig", _BASE, convert=_int8),
    "fp8": Case("Qwen3Config", _QWEN, {"quantization": "fp8_per_channel"}),
    "torchao": Case(
        "LlamaConfig",
        _BASE,
        {"quantization": "torchao", "hf_overrides": {"quantization_config_dict_json": json.dumps(_TORCHAO)}},
    ),
}

MORE = {
    "olmoe": Case("OlmoeConfig", {**_BASE, "intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}),
    "qwen2-moe": Case(
        "Qwen2MoeConfig",
        {**_MOE, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 128, "norm_topk_prob": True},
    ),
    "gemma2": Case("Gemma2Config", {**_QWEN, "sliding_window": 64, "tie_word_embeddings": True}, embedding=0.05),
    "olmo2": Case("Olmo2Config", _BASE),
    "granite": Case("GraniteConfig", _BASE),
    "phi3": Case("Phi3Config", {**_BASE, "pad_token_id": 0}),
    "starcoder2": Case("Starcoder2Config", _BASE),
    "gpt-neox": Case("GPTNeoXConfig", _BASE),
    "gpt2": Case("GPT2Config", {"vocab_size": 1000, "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "opt": Case(
        "OPTConfig",
        {
            "vocab_size": 1000,
            "hidden_size": 256,
            "ffn_dim": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "word_embed_proj_dim": 256,
        },
    ),
    "bloom": Case("BloomConfig", {"vocab_size": 1000, "hidden_size": 256, "n_layer": 2, "n_head": 4}),
    "deepseek-v3": Case(
        "DeepseekV3Config",
        {
            **_BASE,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 128,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "noaux_tc",  # transformers leaves it out, and checkpoints have it.
            "first_k_dense_replace": 1,
            "kv_lora_rank": 512,  # With the rope 576, which kernels want.
            "q_lora_rank": 64,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
        },
        engine={"attention_backend": "CPU_MLA"},  # Beside AMX's, which packs weights where no update finds them.
    ),
    "w4a16": Case("LlamaConfig", _BASE, convert=_w4a16),
    "phi-tied": Case("PhiConfig", {**_BASE, "tie_word_embeddings": True}, {"model_impl": "transformers"}),
}
"""Those of single tests."""


def make(name: str, seed: int, directory: Path) -> Path:
    """Write a checkpoint of random weights in several shards; ``seed`` says which weights."""
    import transformers
    from safetensors.torch import load_file, save_file

    case = {**CASES, **MORE}[name]
    torch.manual_seed(seed)
    config = getattr(transformers, case.config)(**case.options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # Norms are ones; a wrong one would not be seen.
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model.get_input_embeddings().weight.mul_(case.embedding)
    model.save_pretrained(directory, max_shard_size="2MB")
    settings = json.loads((directory / "config.json").read_text())
    if case.convert is not _as_it_is:
        index = directory / "model.safetensors.index.json"
        files = sorted(directory.glob("*.safetensors"))
        tensors = {key: one for file in files for key, one in load_file(file).items()}
        for file in (*files, index):
            file.unlink(missing_ok=True)
        save_file(case.convert(tensors, settings), directory / "model.safetensors", {"format": "pt"})
        (directory / "config.json").write_text(json.dumps(settings))
    return directory
