"""Every model class of transformers, made tiny by its own configuration. It makes configurations, and loads nothing."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence

import torch
import transformers as tf
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

_Sizes = Sequence[tuple[str, int]]

LARGEST = 4_000_000  # elements: what is larger takes seconds

_HIDDEN = (
    r"(hidden_size|d_model|n_embd|embed_dim|embedding_size|embedding_dim|projection_dim|emb_dim|(^|_)dim|proj_size"
    r"|projection_size|hidden_channels|width)$"
)
_LAYERS = r"(layers?|n_layer|depth|num_blocks|n_layers|num_hidden_groups)$"
_INNER = r"(intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|inner_dim|mlp_dim|hidden_dim|dim_feedforward)$"
_SMALL = ((_LAYERS, 2), (_INNER, 48), (_HIDDEN, 32))
_HEADS = (
    (r"(head_dim|d_kv|kv_channels|head_size|v_head_dim)$", 8),
    (r"(num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num)$", 2),
    (r"(heads?|n_head)$", 4),
)
_REST = (
    (r"(vocab_size|codebook_size|vocab_size_per_layer_input)$", 128),
    (r"(max_(position_embeddings|source_positions|target_positions|seq_len|seq_length)|n_positions|n_ctx)$", 64),
    (r"(image_size|input_size)$", 32),
    (r"(^|_)patch_size$", 8),
    (r"(kv|q)_lora_rank$", 8),
    (r"(num_local_experts|num_experts|n_routed_experts|moe_num_experts|num_expert)$", 4),
    (r"(num_experts_per_tok|moe_topk|moe_k|experts_per_token|top_k|topk_group|n_group)$", 2),
)
# Where there is one number for each stage, as in convolutional networks.
_STAGES = (
    (r"(depths|layers|num_blocks|num_hidden_layers)$", 1),
    (r"heads$", 2),
    (r"(hidden_sizes|embed_dims?|dims?|channels|hidden_channels)$", 16),
)
# Some constructors compute these from others, and some do not.
_UNSET = {"head_dim": 8, "vocab_size": 128, "num_key_value_heads": 4}
# From tiny in every way to smaller in few: a class takes the first that it can be made of.
_ALL = (*_REST[:3], *_REST[3:4], *_HEADS, *_REST[4:], *_SMALL)
_WAYS = (
    (_ALL, (), {}),
    ((*_REST, *_SMALL), (), {}),
    (_SMALL, (), {}),
    (_ALL, _STAGES, {}),
    (_ALL, (), _UNSET),
    ((*_REST, *_SMALL), _STAGES, _UNSET),
    ((), (), {}),
)
# Heads that differ from the one for sequences by little but their name.
_ALIKE = re.compile(r"For(TokenClassification|QuestionAnswering(Simple)?|MultipleChoice|NextSentencePrediction)$")


def names() -> list[str]:
    """The classes that an AutoModel of transformers knows, once, without heads that are alike. None is imported."""
    found: set[str] = set()
    for name, mapping in vars(modeling_auto).items():
        if name.endswith("_MAPPING_NAMES"):
            for entry in mapping.values():
                found.update((entry,) if isinstance(entry, str) else entry)
    alike = {name for name in found if _ALIKE.sub("ForSequenceClassification", name) in found - {name}}
    return sorted(name for name in found - alike if not name.endswith("Config"))


def tiny(kind: type[tf.PreTrainedModel]) -> tf.PreTrainedConfig:
    """A configuration of which the class makes a small model.

    Raises:
        ValueError: there is none; it says why.
    """
    why = "its configuration cannot be made without arguments"
    for config in _configurations(kind):
        try:
            config.validate() if hasattr(config, "validate") else None
            with torch.device("meta"), no_init_weights():
                model = kind(config)
            elements = sum(parameter.numel() for parameter in model.parameters())
        except Exception as error:  # Constructors refuse sizes in any way; the first tells most.
            why = f"{type(error).__name__}: {str(error).strip()[:100]}"
            continue
        if elements < LARGEST:
            return config
        why = f"{elements} elements at the least that was found"
    raise ValueError(why)


def _configurations(kind: type[tf.PreTrainedModel]) -> Iterator[tf.PreTrainedConfig]:
    for way in _WAYS:
        try:
            yield _shrunk(kind.config_class(), *way)
        except Exception:  # As above.
            continue


def _shrunk(config: tf.PreTrainedConfig, sizes: _Sizes, stages: _Sizes, unset: dict[str, int]) -> tf.PreTrainedConfig:
    config = copy.deepcopy(config)
    layers = getattr(config, "num_hidden_layers", None)
    for name, value in list(vars(config).items()):
        if isinstance(value, tf.PreTrainedConfig):
            setattr(config, name, _shrunk(value, sizes, stages, unset))
        elif value is None and name in unset:
            setattr(config, name, unset[name])
        elif type(value) is int and value > 2 and name.endswith(("_token_id", "_token_index")):
            setattr(config, name, value % 100)  # within the vocabulary
        elif type(value) is int and not name.endswith(("_id", "_index")):
            setattr(config, name, min(value, _size(name, sizes, value)))
        elif isinstance(value, (list, tuple)) and value and all(type(number) is int for number in value):
            setattr(config, name, type(value)(min(number, _size(name, stages, number)) for number in value))
    if type(layers) is int and layers > config.num_hidden_layers:
        for name, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == layers:  # One entry for each layer, as layer_types has.
                setattr(config, name, value[-config.num_hidden_layers :])
    return config


def _size(name: str, sizes: _Sizes, otherwise: int) -> int:
    return next((size for pattern, size in sizes if re.search(pattern, name)), otherwise)
