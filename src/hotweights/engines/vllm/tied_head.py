"""The output head of a model whose config ties it to the embedding, where checkpoints may bring one all the same.

vLLM ties by the checkpoint that an engine starts with, and its loading code leaves out what it does not need then.
Later versions may differ in that: here a head that is tied is compared with the embedding, and one that is not is
filled from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ...manifest import Manifest

Pairs = Iterable[tuple[str, torch.Tensor]]

_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "embeddings.weight")


def reconcile_head(model: nn.Module, model_config: Any) -> None:
    """Let the model's own ``load_weights`` see a head where it needs one, or has one that must be compared."""
    untied = getattr(model_config, "word_embeddings_untied_by_checkpoint", False)
    heads = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "lm_head"]
    if not any("weight" in head._parameters for head in heads):
        return  # An embedding model has no head, whatever its config says: what checkpoints bring is left out.
    load: Callable[[Pairs], object] = model.load_weights  # type: ignore[assignment]
    if untied:
        model.load_weights = lambda weights: load(_untied(weights))  # type: ignore[assignment]
    elif getattr(model_config.hf_config.get_text_config(), "tie_word_embeddings", False):
        model.load_weights = lambda weights: load(_tied(weights))  # type: ignore[assignment]


_MAKES_BIASES = "vllm.model_executor.models.transformers.causal"


def keep_head_bias(model: nn.Module, manifest: Manifest) -> None:
    """Give the head the bias that the checkpoint has. Call it on the model's device.

    vLLM's Transformers backend makes a new one at each load, which no plan can follow; and what falls back to its
    loading code is not compared where it is tied.
    """
    head: Any = getattr(model, "lm_head", None)
    makes = any(kind.__module__ == _MAKES_BIASES for kind in type(model).__mro__)
    if makes and hasattr(head, "_register_bias") and any(name.endswith("lm_head.bias") for name in manifest):
        head._register_bias()
        head._register_bias = lambda: None


def twin_of_head(model_config: Any, manifest: Manifest) -> dict[str, str]:
    """How the head's name ends and what the embedding is called, where both are one tensor and the head is left out."""
    tied = getattr(model_config.hf_config.get_text_config(), "tie_word_embeddings", False)
    embeddings = [name for name in manifest if name.endswith(_EMBEDDINGS)]
    has_head = any(name.endswith(_HEAD) for name in manifest)
    return {_HEAD: embeddings[0]} if tied and not has_head and len(embeddings) == 1 else {}


def _untied(weights: Pairs) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights; without a head among them, the embedding once more as the head."""
    embeddings: list[tuple[str, torch.Tensor]] = []
    has_head = False
    for name, tensor in weights:
        has_head |= name.endswith(_HEAD)
        if name.endswith(_EMBEDDINGS):
            embeddings.append((name, tensor))
        yield name, tensor
    if not has_head and len(embeddings) == 1:
        yield _HEAD, embeddings[0][1]


def _tied(weights: Pairs) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights; a head among them once more as the embedding: both are one tensor, and must be equal."""
    embeddings: list[str] = []
    heads: list[torch.Tensor] = []
    for name, tensor in weights:
        if name.endswith(_HEAD):
            heads.append(tensor)
        if name.endswith(_EMBEDDINGS):
            embeddings.append(name)
        yield name, tensor
    if len(heads) == len(embeddings) == 1:
        yield embeddings[0], heads[0]
