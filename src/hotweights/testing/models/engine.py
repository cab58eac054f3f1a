"""Engine: a small model that loads as the engines' do, by ``load_weights`` and ``weight_loader`` on parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import nn

Pairs = Iterable[tuple[str, torch.Tensor]]
_WIDTH, _VOCABULARY, _PADDED, _EXPERTS = 8, 6, 8, 2


class _Sliced(nn.Module):
    """A weight of which each rank holds its rows."""

    def __init__(self, rows: int, columns: int, rank: int, world: int) -> None:
        super().__init__()
        self.rank, self.world = rank, world
        self.weight = _parameter(rows // world, columns)
        self.weight.weight_loader = self.load  # type: ignore[attr-defined]

    def load(self, param: torch.Tensor, loaded: torch.Tensor) -> None:
        """Copy this rank's rows."""
        rows = param.shape[0]
        param.data.copy_(loaded.narrow(0, self.rank * rows, rows))


class _Fused(_Sliced):
    """Several weights, one below the other in one parameter; of each, a rank holds its rows."""

    def __init__(self, parts: int, columns: int, rank: int, world: int) -> None:
        super().__init__(parts * columns, columns, rank, world)
        self.parts = parts
        self.weight.weight_loader = self.load_part  # type: ignore[attr-defined]

    def load_part(self, param: torch.Tensor, loaded: torch.Tensor, part: int) -> None:
        """Copy this rank's rows of one part."""
        rows = param.shape[0] // self.parts
        param.data.narrow(0, part * rows, rows).copy_(loaded.narrow(0, self.rank * rows, rows))


class _Embedding(_Sliced):
    """A vocabulary that is padded to a rounder number with zeros."""

    def __init__(self) -> None:
        super().__init__(_PADDED, _WIDTH, 0, 1)

    def load(self, param: torch.Tensor, loaded: torch.Tensor) -> None:
        """Copy what there is, and fill the rest."""
        param[: loaded.shape[0]].data.copy_(loaded)
        param[loaded.shape[0] :].data.fill_(0)


class _Mixer(nn.Module):
    """A state space model's three vectors of one size. One is copied, and then transformed where it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.D, self.dt_bias = _parameter(_WIDTH), _parameter(_WIDTH), _parameter(_WIDTH)
        self.A.weight_loader = self.composed  # type: ignore[attr-defined]
        self.register_buffer("conv_weights", self.D.data.view(_WIDTH, 1), persistent=False)

    @staticmethod
    def composed(param: torch.Tensor, loaded: torch.Tensor) -> None:
        """First the plain loader, then one that reads what that wrote."""
        param.data.copy_(loaded)
        param.data.copy_(-torch.exp(param.data.float()))


class _Experts(nn.Module):
    """Stacks of experts; some checkpoints hold them one by one, some as one tensor in another order of axes."""

    def __init__(self) -> None:
        super().__init__()
        self.w13 = _parameter(_EXPERTS, 2 * _WIDTH, _WIDTH)
        self.w2 = _parameter(_EXPERTS, _WIDTH, _WIDTH)
        self.register_buffer("expert_map", torch.tensor([1, -1, 0]), persistent=False)

    def load(self, loaded: torch.Tensor, expert: int, part: int) -> None:
        """Copy gate or up of an expert that this rank holds."""
        assert isinstance(self.expert_map, torch.Tensor)
        local = int(self.expert_map[expert].item())
        if local >= 0:
            self.w13.data[local, part * _WIDTH : (part + 1) * _WIDTH] = loaded


class Engine(nn.Module):
    """A model with every way of loading that the engines' models have.

    Args:
        rank: which rank's slices it holds.
        world: how many ranks there are.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        super().__init__()
        self.embed = _Embedding()
        self.qkv = _Fused(3, _WIDTH, rank, world)
        self.gate_up = _Fused(2, _WIDTH, rank, world)
        self.down = _Sliced(_WIDTH, _WIDTH, rank, world)
        self.mixer = _Mixer()
        self.experts = _Experts()
        self.norm = nn.LayerNorm(_WIDTH, bias=False, dtype=torch.bfloat16)
        self.scaled = _parameter(_WIDTH, _WIDTH)
        self.factor = nn.Parameter(torch.ones(()), requires_grad=False)
        self.listed = [_parameter(_WIDTH), _parameter(_WIDTH)]  # not registered: state_dict() lacks them
        self.kept = self.mixer.dt_bias.data  # a reference that was taken before any load
        self.loaded: set[str] = set()

    def load_weights(self, pairs: Pairs) -> set[str]:
        """Load pairs in any order: a tensor that needs another one waits for it."""
        waiting: dict[str, torch.Tensor] = {}
        late: list[Callable[[], object]] = []
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(work) for name, tensor in pairs for work in self._work(name, tensor, waiting, late)]
            for future in futures:
                future.result()
        for work in late:
            work()
        return self.loaded

    def _work(
        self, name: str, tensor: torch.Tensor, waiting: dict[str, torch.Tensor], late: list[Callable[[], object]]
    ) -> Iterable[Callable[[], object]]:
        self.loaded.add(name)
        module, _, key = name.rpartition(".")
        if name in ("q", "k", "v"):
            yield partial(self._fused, self.qkv, tensor, "qkv".index(name))
        elif name in ("gate", "up"):
            yield partial(self._fused, self.gate_up, tensor, ("gate", "up").index(name))
        elif module == "experts" and key == "w2":
            late.append(partial(self.experts.w2.data.copy_, tensor.permute(0, 2, 1)))
        elif module.startswith("experts."):
            part = ("gate", "up").index(key)
            yield partial(self.experts.load, tensor, int(module.removeprefix("experts.")), part)
        elif name in ("scaled", "scaled.scale"):
            waiting[name] = tensor
            if len(waiting) == 2:
                late.append(lambda: self.scaled.copy_(waiting["scaled"].float() * waiting["scaled.scale"]))
        elif module == "listed":
            late.append(partial(self.listed[int(key)].data.copy_, tensor))
        elif name == "mixer.dt_bias":
            yield partial(self.kept.copy_, tensor)
        elif name == "factor":
            self.factor.data.fill_(tensor.item())
        else:
            param = dict(self.named_parameters()).get(name)
            if param is not None:  # Others' tensors are dropped.
                yield partial(getattr(param, "weight_loader", _plainly), param, tensor)

    def _fused(self, module: Any, tensor: torch.Tensor, part: int) -> None:
        module.weight.weight_loader(module.weight, tensor, part)


def engine_checkpoint(seed: int = 0) -> dict[str, torch.Tensor]:
    """A checkpoint for ``Engine``: unfused, unstacked, with scales, and with tensors that nothing takes."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    square = (_WIDTH, _WIDTH)
    names = ["q", "k", "v", "gate", "up", "down.weight"]
    names += [f"experts.{expert}.{part}" for expert in range(_EXPERTS + 1) for part in ("gate", "up")]
    return {
        "embed.weight": rand(_VOCABULARY, _WIDTH),
        **{name: rand(*square) for name in names},
        "experts.w2": rand(_EXPERTS, *square),
        **{f"mixer.{name}": rand(_WIDTH) for name in ("A", "D", "dt_bias")},
        "norm.weight": rand(_WIDTH),
        "scaled": rand(*square).to(torch.float8_e4m3fn),
        "scaled.scale": rand(1),
        "factor": rand(1),
        "listed.0": rand(_WIDTH),
        "listed.1": rand(_WIDTH),
        "rotary.inv_freq": rand(3),
    }


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, torch.nan), requires_grad=False)


def _plainly(param: torch.Tensor, loaded: torch.Tensor) -> None:
    param.data.copy_(loaded)
