"""VisionLanguage: a small model of four parts with loading code of their own, and one checkpoint for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import nn

from ...routing.component import Component
from ...routing.report import RouteReport
from ...routing.route import route

Pairs = Iterable[tuple[str, torch.Tensor]]
_WIDTH = 8


class _Language(nn.Module):
    """Layers with a fused attention weight, and a scaled weight that waits for its scale."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = _parameter(2 * width, width)
        self.qkv = nn.ParameterList(_parameter(3 * width, width) for _ in range(layers))
        self.down = nn.ParameterList(_parameter(width, width) for _ in range(layers))

    def load_weights(self, pairs: Pairs) -> set[str]:
        """Load; of a weight and its scale, whichever comes first is kept until the other is there."""
        waiting: dict[str, torch.Tensor] = {}
        loaded: set[str] = set()
        for name, tensor in pairs:
            loaded.add(name)
            if name == "embed":
                self.embed.copy_(tensor)
                continue
            _, number, key = name.split(".", 2)
            if key in ("q", "k", "v"):
                self.qkv[int(number)].chunk(3)["qkv".index(key)].copy_(tensor)
                continue
            waiting[name] = tensor
            weight = name.removesuffix(".scale")
            if weight in waiting and weight + ".scale" in waiting:
                self.down[int(number)].copy_(waiting.pop(weight).float() * waiting.pop(weight + ".scale"))
        assert not waiting, f"without their other half: {sorted(waiting)}"
        return loaded


class _Tower(nn.Module):
    """Blocks, which are loaded in sorted order once all of them are there."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ParameterList(_parameter(width, width) for _ in range(blocks))

    def load_weights(self, pairs: Pairs) -> set[str]:
        """Load; the stream is collected and sorted first."""
        ready = sorted(pairs, key=lambda pair: pair[0])
        for name, tensor in ready:
            self.blocks[int(name.rpartition(".")[2])].copy_(tensor)
        return {name for name, _ in ready}


class VisionLanguage(nn.Module):
    """A vision-language model of four parts, loaded through ``hotweights.route``.

    Args:
        sound: whether it has a sound encoder.
        limits: how many items of a modality a request may hold. With a limit of 0 the encoder of that modality, and the
            adapter that only images use, stay as they are.
        width: of every matrix.
        layers: of the language model; the towers have half as many blocks.
    """

    def __init__(
        self, *, sound: bool = True, limits: Mapping[str, int] | None = None, width: int = _WIDTH, layers: int = 4
    ) -> None:
        super().__init__()
        self.limits = {"image": 1, "audio": 1, **(limits or {})}
        self.language_model = _Language(width, layers)
        self.mlp1 = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.vision_model = _Tower(width, layers // 2)
        self.sound_encoder = _Tower(width, layers // 2) if sound else None

    def components(self) -> list[Component]:
        """Its parts, and which tensors of a checkpoint are theirs."""
        images, sounds = self.limits["image"] > 0, self.limits["audio"] > 0
        sound = None if self.sound_encoder is None else self.sound_encoder.load_weights
        return [
            Component("language_model.", self.language_model.load_weights),
            Component("mlp1.", self.mlp1, enabled=images),
            Component(
                "vision_model.radio_model.", self.vision_model.load_weights, strip="vision_model.", enabled=images
            ),
            Component("sound_encoder.", sound, enabled=sounds),
        ]

    def load_weights(self, pairs: Pairs) -> RouteReport:
        """Load from a stream whose tensors may be overwritten when it advances."""
        return route(pairs, self.components())


def vision_language_checkpoint(
    seed: int = 0, *, sound: bool = True, width: int = _WIDTH, layers: int = 4
) -> dict[str, torch.Tensor]:
    """A checkpoint for ``VisionLanguage``, of bfloat16 but for the adapter and the scales."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.rand(shape, generator=generator).to(dtype)

    state = {"language_model.embed": rand(2 * width, width)}
    for number in range(layers):
        layer = f"language_model.layers.{number}"
        state |= {f"{layer}.{key}": rand(width, width) for key in ("q", "down", "k", "v")}
        state[f"{layer}.down.scale"] = rand(1, dtype=torch.float32)
    full = partial(rand, dtype=torch.float32)
    state |= {"mlp1.0.weight": full(2 * width, width), "mlp1.0.bias": full(2 * width)}
    state |= {"mlp1.2.weight": full(width, 2 * width), "mlp1.2.bias": full(width)}
    for tower in ("vision_model.radio_model", *(["sound_encoder"] if sound else [])):
        state |= {f"{tower}.blocks.{number}": rand(width, width) for number in range(layers // 2)}
    return state


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, torch.nan), requires_grad=False)
