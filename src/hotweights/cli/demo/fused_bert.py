"""A BERT as an engine would write it: fused QKV, sliced over ranks, with loading code of its own. For the demo."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

_NAMES = (
    (r"embeddings\.(\w+_embeddings)\.", r"\1."),
    (r"embeddings\.LayerNorm\.", "norm."),
    (r"encoder\.layer\.", "layers."),
    (r"attention\.self\.(query|key|value)\.", r"qkv.\1."),
    (r"attention\.output\.dense\.", "out."),
    (r"attention\.output\.LayerNorm\.", "norm1."),
    (r"intermediate\.dense\.", "up."),
    (r"output\.dense\.", "down."),
    (r"output\.LayerNorm\.", "norm2."),
    (r"pooler\.dense\.", "pooler."),
)
_PARTS = {"query": 0, "key": 1, "value": 2}


class FusedBert(nn.Module):
    """BERT's encoder. One rank of ``world`` holds its share of every matrix; only a single rank can run."""

    def __init__(self, config: Any, *, rank: int = 0, world: int = 1) -> None:
        super().__init__()
        self._heads = config.num_attention_heads
        self._rank = rank
        self._world = world
        width = config.hidden_size
        self.word_embeddings = self._sliced(nn.Embedding(config.vocab_size // world, width), dim=0)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(self._layer(config) for _ in range(config.num_hidden_layers))
        self.pooler = self._sliced(nn.Linear(width, width // world), dim=0)

    def _layer(self, config: Any) -> nn.Module:
        width, inner, world = config.hidden_size, config.intermediate_size, self._world
        return nn.ModuleDict(
            {
                "qkv": self._sliced(nn.Linear(width, 3 * width // world), dim=0, parts=3),
                "out": self._sliced(nn.Linear(width // world, width), dim=1),
                "norm1": nn.LayerNorm(width, eps=config.layer_norm_eps),
                "up": self._sliced(nn.Linear(width, inner // world), dim=0),
                "down": self._sliced(nn.Linear(inner // world, width), dim=1),
                "norm2": nn.LayerNorm(width, eps=config.layer_norm_eps),
            }
        )

    def _sliced(self, module: nn.Module, *, dim: int, parts: int = 1) -> nn.Module:
        """Give the parameters of ``module`` the loader that takes this rank's slice, as engines do."""

        def load(param: torch.Tensor, tensor: torch.Tensor, part: int = 0) -> None:
            place = param.data.chunk(parts)[part] if parts > 1 else param.data
            if place.shape != tensor.shape:
                size = place.shape[dim]
                tensor = tensor.narrow(dim, self._rank * size, size)
            place.copy_(tensor)

        for parameter in module.parameters():
            parameter.weight_loader = load  # type: ignore[attr-defined]
        return module

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load a checkpoint of transformers' BertModel. It knows nothing of hotweights."""
        params = dict(self.named_parameters())
        for name, tensor in weights:
            for pattern, replacement in _NAMES:
                name = re.sub(pattern, replacement, name)
            part = next((number for word, number in _PARTS.items() if f".{word}." in name), 0)
            param = params.get(re.sub(r"\.(query|key|value)\.", ".", name))
            if param is not None:
                loader: Callable[..., None] = getattr(param, "weight_loader", _copy)
                loader(param, tensor, part)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[batch, tokens, width]`` of token ``ids`` under an attention ``mask``."""
        where = torch.arange(ids.shape[1])
        types = self.token_type_embeddings.weight[0]
        hidden: torch.Tensor = self.norm(self.word_embeddings(ids) + self.position_embeddings(where) + types)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            q, k, v = (
                part.unflatten(-1, (self._heads, -1)).transpose(1, 2) for part in layer["qkv"](hidden).chunk(3, -1)
            )
            seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].bool())
            hidden = layer["norm1"](hidden + layer["out"](seen.transpose(1, 2).flatten(2)))
            hidden = layer["norm2"](hidden + layer["down"](functional.gelu(layer["up"](hidden))))
        return hidden


def _copy(param: torch.Tensor, tensor: torch.Tensor, part: int = 0) -> None:
    param.data.copy_(tensor)
