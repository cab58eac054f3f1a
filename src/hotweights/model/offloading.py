"""Offloading: weights that a hook keeps elsewhere and brings back before each forward. Whatever is loaded is lost then.

Hooks that move or cast a module's own tensors lose nothing, but leave no tensor at its address. No framework is asked
for: accelerate's hooks and their like are known by what they hold, and those that move by their class.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ..errors import PlanError
from ..memory.aliases import has_bytes
from ..memory.extents import Extents
from ..text import some
from .survey import Survey
from .walk import MODULE_PRIVATE, walk

_VISITED = 10_000  # objects behind the hooks of one module; a hook may lead to a whole trainer
_NEAR = 2  # Where such a walk begins, of ``walk.DEPTH`` steps


def refuse_offloaded(model: nn.Module, surveyed: Survey) -> None:
    """Raise ``PlanError`` if hooks of the model keep its weights elsewhere, or move them."""
    _refuse(model, surveyed, set())
    _refuse_moved(model, surveyed)


def refuse_unwritable(model: nn.Module, surveyed: Survey) -> None:
    """Raise ``PlanError`` if hooks of the model keep its weights where the survey does not find them."""
    _refuse(model, surveyed, surveyed.offloaded.hooks)


def refuse_own_code(model: nn.Module, surveyed: Survey) -> None:
    """Raise ``PlanError`` if hooks keep any weights: the model's own loading code would write to what is on meta."""
    if surveyed.kept:
        raise PlanError(
            "source and model do not fit; nothing was read or written",
            [
                f"{some(surveyed.kept)}: offloaded, and {type(model).__name__} has loading code of its own, which "
                f"would write to the meta tensors that the modules have instead; {_WAY_OUT}"
            ],
        )


_WAY_OUT = (
    "load the model before it is dispatched or offloaded, or take the hooks off first "
    "(accelerate.hooks.remove_hook_from_submodules(model))"
)


def _refuse(model: nn.Module, surveyed: Survey, known: set[int]) -> None:
    if not surveyed.hooked:
        return
    seen = {id(module) for module in model.modules()} | known
    seen.update(map(id, surveyed.tensors.values()))
    keepers: dict[str, list[str]] = {}
    for name, module in surveyed.hooked:
        if (keeper := _keeper(module, surveyed.tensors, seen)) is not None:
            reason = surveyed.offloaded.reasons.get(name)
            keeper += f" keeps these weights elsewhere ({reason})" if reason else " keeps these weights elsewhere"
            keepers.setdefault(keeper, []).append(name or type(model).__name__)
    if keepers:
        raise PlanError(
            "source and model do not fit; nothing was read or written",
            (
                f"{some(names)}: {keeper} and brings the old ones back at each forward, "
                f"so what is loaded would be lost; {_WAY_OUT}"
                for keeper, names in keepers.items()
            ),
        )


_MOVING = {"CpuOffload", "LayerwiseCastingHook", "GroupOffloadingHook"}  # accelerate's and diffusers', by class


def _refuse_moved(model: nn.Module, surveyed: Survey) -> None:
    own = {id(module) for module in model.modules()} | {*map(id, surveyed.tensors.values())}
    moved: dict[str, list[str]] = {}
    for name, module in surveyed.hooked:
        seen = set(own)  # Several modules may have one hook.
        hooks = (value for hook in _hooks(module, on_meta=False) for _, value in walk("", hook, seen, _NEAR))
        if kind := next(filter(None, map(_mover, itertools.islice(hooks, _VISITED))), None):
            moved.setdefault(kind, []).append(name or type(model).__name__)
    if moved:
        raise PlanError(
            "a live model keeps the addresses of its tensors; nothing was read or written",
            (
                f"{some(names)}: {kind} moves or casts these weights at each forward; make the live model of one "
                "without such hooks (accelerate's are taken off by accelerate.hooks.remove_hook_from_submodules(model))"
                for kind, names in moved.items()
            ),
        )


def _mover(value: object) -> str | None:
    """The name of its class, if it is a hook that puts a module's tensors elsewhere."""
    names = {kind.__name__ for kind in type(value).__mro__}
    return type(value).__name__ if names & _MOVING else None


def _keeper(module: nn.Module, tensors: Mapping[str, torch.Tensor], seen: set[int]) -> str | None:
    """What keeps weights of the module, in words."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for hook in _hooks(module, any(tensor.is_meta for tensor in own.values())):
        for _, value in itertools.islice(walk("", hook, seen, _NEAR), _VISITED):
            if _offloads(value) or (isinstance(value, Mapping) and _keeps(value, own, tensors)):
                return getattr(hook, "__qualname__", type(hook).__qualname__)
    return None


def _hooks(module: nn.Module, on_meta: bool) -> Iterator[object]:
    """What runs before the module's forward or in its place; where its tensors are gone, all its attributes."""
    for key, value in module.__dict__.items():
        if key not in MODULE_PRIVATE and (on_meta or key == "forward" or key.endswith("_hook")):
            yield value
    for hook in (*module._forward_pre_hooks.values(), module.__dict__.get("forward")):
        yield hook
        if isinstance(hook, types.MethodType):
            yield hook.__func__


def _offloads(value: object) -> bool:
    """Whether it is a hook as accelerate makes them; its map may read files, so it is not asked for tensors."""
    return getattr(value, "offload", False) is True and getattr(value, "weights_map", None) is not None


def _keeps(kept: Mapping[object, object], own: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether it holds other values for a tensor of the model, by the tensor's name or by the tensor itself."""
    for key in itertools.islice(kept, _VISITED):
        tensor = own.get(key, tensors.get(key)) if isinstance(key, str) else key
        if not isinstance(tensor, torch.Tensor) or nn.parameter.is_lazy(tensor):
            continue
        if not isinstance(kept, dict):  # It may be one that reads files.
            return tensor.is_meta
        value = kept[key]
        if isinstance(value, torch.Tensor) and has_bytes(value) and not Extents([tensor]).meets(value):
            return tensor.is_meta or tensor.shape == value.shape
    return False
