"""Tiny models of many architectures with random weights. It builds and saves them, and loads nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as tf

DENSE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = DENSE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.2,
}


def _without(options: dict[str, object], *names: str) -> dict[str, object]:
    return {name: value for name, value in options.items() if name not in names}


@dataclass(frozen=True)
class Architecture:
    """How to make one, and what its loading must show.

    Attributes:
        make: the model's class and its configuration.
        programs: whether tensors of its files are converted.
        renamed: whether tensors of its files have other names in the model.
        tied: names that must be one tensor.
        frozen: parameters whose class wants no gradients; ``from_pretrained`` forgets that, we do not.
        never_saved: parameters that ``save_pretrained`` leaves out, because the class computes them.
        inputs: of one forward call, where outputs are compared too.
    """

    make: Callable[[], tuple[type[tf.PreTrainedModel], tf.PreTrainedConfig]]
    programs: bool = False
    renamed: bool = False
    tied: tuple[str, str] | None = None
    frozen: tuple[str, ...] = ()
    never_saved: tuple[str, ...] = ()
    inputs: Callable[[], dict[str, torch.Tensor]] | None = None


def _tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[1, 17, 33, 5, 80, 2]])}


def _seq2seq() -> dict[str, torch.Tensor]:
    return _tokens() | {"decoder_input_ids": torch.tensor([[1, 9, 4]])}


def _pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)}


_ENCODER_DECODER = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

_MARIAN_POSITIONS = ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(lambda: (tf.LlamaForCausalLM, tf.LlamaConfig(**DENSE)), inputs=_tokens),
    "qwen3": Architecture(lambda: (tf.Qwen3ForCausalLM, tf.Qwen3Config(**DENSE)), inputs=_tokens),
    "gpt2": Architecture(
        lambda: (
            tf.GPT2LMHeadModel,
            tf.GPT2Config(
                vocab_size=96,
                n_positions=64,
                n_embd=32,
                n_layer=2,
                n_head=4,
                initializer_range=0.2,
                bos_token_id=1,
                eos_token_id=2,
            ),
        ),
        tied=("lm_head.weight", "transformer.wte.weight"),
        inputs=_tokens,
    ),
    "gpt-j": Architecture(
        lambda: (
            tf.GPTJForCausalLM,
            tf.GPTJConfig(
                vocab_size=96,
                n_positions=64,
                n_embd=32,
                n_layer=2,
                n_head=4,
                rotary_dim=8,
                initializer_range=0.2,
                bos_token_id=1,
                eos_token_id=2,
            ),
        ),
        inputs=_tokens,
    ),
    "qwen3-tied": Architecture(
        lambda: (tf.Qwen3ForCausalLM, tf.Qwen3Config(**DENSE, tie_word_embeddings=True)),
        tied=("lm_head.weight", "model.embed_tokens.weight"),
        inputs=_tokens,
    ),
    "gemma3": Architecture(
        lambda: (
            tf.Gemma3ForCausalLM,
            tf.Gemma3TextConfig(**DENSE, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
        ),
        tied=("lm_head.weight", "model.embed_tokens.weight"),
        inputs=_tokens,
    ),
    "bert": Architecture(
        lambda: (tf.BertForMaskedLM, tf.BertConfig(**_without(DENSE, "num_key_value_heads", "head_dim"))),
        tied=("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        inputs=_tokens,
    ),
    "mixtral": Architecture(
        lambda: (tf.MixtralForCausalLM, tf.MixtralConfig(**DENSE, num_local_experts=4)),
        programs=True,
        renamed=True,
        inputs=_tokens,
    ),
    "qwen3-moe": Architecture(
        lambda: (tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig(**MOE)), programs=True, inputs=_tokens
    ),
    "gpt-oss": Architecture(
        lambda: (
            tf.GptOssForCausalLM,
            tf.GptOssConfig(**DENSE, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
        ),
        inputs=_tokens,
    ),
    "deepseek-v3": Architecture(
        lambda: (
            tf.DeepseekV3ForCausalLM,
            tf.DeepseekV3Config(
                **_without(DENSE, "head_dim", "num_key_value_heads"),
                num_key_value_heads=4,
                moe_intermediate_size=16,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_shared_experts=1,
                n_group=2,
                topk_group=1,
                kv_lora_rank=8,
                q_lora_rank=8,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=8,
                first_k_dense_replace=1,
            ),
        ),
        programs=True,
        inputs=_tokens,
    ),
    "t5": Architecture(
        lambda: (
            tf.T5ForConditionalGeneration,
            tf.T5Config(
                vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
            ),
        ),
        tied=("encoder.embed_tokens.weight", "shared.weight"),
        inputs=_seq2seq,
    ),
    "bart": Architecture(
        lambda: (tf.BartForConditionalGeneration, tf.BartConfig(**_ENCODER_DECODER, max_position_embeddings=64)),
        tied=("lm_head.weight", "model.shared.weight"),
        inputs=_seq2seq,
    ),
    "marian": Architecture(
        lambda: (tf.MarianMTModel, tf.MarianConfig(**_ENCODER_DECODER, max_position_embeddings=64)),
        tied=("lm_head.weight", "model.shared.weight"),
        frozen=_MARIAN_POSITIONS,
        never_saved=_MARIAN_POSITIONS,
        inputs=_seq2seq,
    ),
    "whisper": Architecture(
        lambda: (
            tf.WhisperForConditionalGeneration,
            tf.WhisperConfig(**_ENCODER_DECODER, num_mel_bins=8, max_source_positions=8, max_target_positions=16),
        ),
        tied=("proj_out.weight", "model.decoder.embed_tokens.weight"),
        frozen=("model.encoder.embed_positions.weight",),
    ),
    "wav2vec2": Architecture(
        lambda: (
            tf.Wav2Vec2Model,
            tf.Wav2Vec2Config(
                **_without(VISION, "image_size", "patch_size"),
                vocab_size=32,
                conv_dim=(16, 16),
                conv_stride=(5, 2),
                conv_kernel=(10, 3),
                num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=4,
            ),
        ),
    ),
    "llava": Architecture(
        lambda: (
            tf.LlavaForConditionalGeneration,
            tf.LlavaConfig(
                vision_config=tf.CLIPVisionConfig(**VISION),
                text_config=tf.LlamaConfig(**DENSE),
                image_token_index=95,
            ),
        ),
        renamed=True,
        inputs=_tokens,
    ),
    "qwen2-vl": Architecture(
        lambda: (
            tf.Qwen2VLForConditionalGeneration,
            tf.Qwen2VLConfig(
                text_config=DENSE | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
                vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4},
            ),
        ),
        renamed=True,
        inputs=_tokens,
    ),
    "mamba": Architecture(
        lambda: (
            tf.MambaForCausalLM,
            tf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.2),
        ),
        tied=("lm_head.weight", "backbone.embeddings.weight"),
    ),
    "mamba2": Architecture(
        lambda: (
            tf.Mamba2ForCausalLM,
            tf.Mamba2Config(
                vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=2
            ),
        ),
    ),
    "vit": Architecture(
        lambda: (tf.ViTForImageClassification, tf.ViTConfig(**VISION, num_labels=5)), renamed=True, inputs=_pixels
    ),
    "resnet": Architecture(
        lambda: (
            tf.ResNetForImageClassification,
            tf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type="basic", num_labels=5),
        ),
        inputs=_pixels,
    ),
}


def fresh(name: str, dtype: torch.dtype = torch.float32) -> tf.PreTrainedModel:
    """An ordinary model of this architecture with weights of its own, all of them random."""
    model_class, config = ARCHITECTURES[name].make()
    return randomised(model_class._from_config(config, dtype=dtype))


@torch.no_grad()
def randomised(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """Norms that are all ones, biases and counters that are all zeros would hide a tensor that was not loaded."""
    state = set(model.state_dict())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in state and tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor) * 0.25)
        elif name in state:
            tensor.add_(torch.randint_like(tensor, 1, 10**9))
    return model


def save(model: tf.PreTrainedModel, directory: Path, max_shard_size: str = "40KB") -> Path:
    """What ``save_pretrained`` writes; small shards, so that most models have several."""
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory
