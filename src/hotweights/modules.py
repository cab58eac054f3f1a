"""The tensors of a module by the names of its state dict, and meta tensors made real. It copies no weights."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple

import msgspec
import torch
from torch import nn

from .manifest import TensorSpec
from .plan import Target

__all__ = ["Place", "Survey", "describe", "extra_state_problems", "hook_problems", "materialise", "places", "survey"]


class Place(msgspec.Struct, frozen=True, gc=False):
    """Where a tensor of a module lives: ``module._parameters[key]`` or ``module._buffers[key]``.

    Attributes:
        name: its name in the state dict; for a non-persistent buffer, the name it would have.
        module: the module that holds it.
        key: the attribute's name.
        persistent: whether the state dict has it.
    """

    name: str
    module: nn.Module
    key: str
    persistent: bool

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor as it is now."""
        tensor: torch.Tensor | None = self.module._parameters.get(self.key)
        if tensor is None:
            tensor = self.module._buffers[self.key]
        assert tensor is not None
        return tensor

    def put(self, tensor: torch.Tensor) -> None:
        """Put another tensor in its place."""
        store = self.module._parameters if self.module._parameters.get(self.key) is not None else self.module._buffers
        store[self.key] = tensor  # type: ignore[assignment]


def places(model: nn.Module) -> Iterator[Place]:
    """Every parameter and buffer, once for each name it has, in the order of the state dict."""
    stack = [("", model)]
    while stack:  # named_modules() gives the same in four times the time, and every load comes here.
        dot, module = stack.pop()
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield Place(dot + key, module, key, persistent=True)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                yield Place(dot + key, module, key, persistent=key not in module._non_persistent_buffers_set)
        children = [(f"{dot}{key}.", child) for key, child in module._modules.items() if child is not None]
        stack += reversed(children)


class Survey(NamedTuple):
    """What one walk over a model finds.

    Attributes:
        tensors: every parameter and buffer, by each name it has, in the order of ``places``.
        transient: which of them are not persistent.
        plain: whether loading is copying by name: nowhere is there loading code, a hook or extra state.
    """

    tensors: dict[str, torch.Tensor]
    transient: list[str]
    plain: bool


def survey(model: nn.Module) -> Survey:
    """Look at every module once. Every load does, so it asks all its questions on one walk."""
    tensors: dict[str, torch.Tensor] = {}
    transient: list[str] = []
    plain = not hasattr(model, "load_weights") and _loads_by_name(model)
    kinds: dict[type, bool] = {}
    stack = [("", model)]
    while stack:
        dot, module = stack.pop()
        inside = module.__dict__
        kind = type(module)
        if kind not in kinds:
            kinds[kind] = not _has_loading_code(kind) and kind.set_extra_state is nn.Module.set_extra_state
        if not kinds[kind] or inside["_load_state_dict_pre_hooks"] or inside["_load_state_dict_post_hooks"]:
            plain = False
        for key, tensor in inside["_parameters"].items():
            if tensor is not None:
                tensors[dot + key] = tensor
        for key, tensor in inside["_buffers"].items():
            if tensor is not None:
                tensors[dot + key] = tensor
                if key in inside["_non_persistent_buffers_set"]:
                    transient.append(dot + key)
        if inside["_modules"]:
            children = [(f"{dot}{key}.", child) for key, child in inside["_modules"].items() if child is not None]
            stack += reversed(children)
    return Survey(tensors, transient, plain)


def describe(tensor: torch.Tensor, name: str, owner: str, *, device: torch.device | None) -> Target:
    """The tensor as a target of a plan; ``device`` is where meta tensors will be made real."""
    if nn.parameter.is_lazy(tensor):
        return Target(TensorSpec(name, tensor.dtype, ()), owner, "is uninitialised; run the model once first")
    stride = None if tensor.layout is not torch.strided or tensor.is_contiguous() else tensor.stride()
    return Target(TensorSpec(name, tensor.dtype, tuple(tensor.shape)), owner, _unwritable(tensor, device), stride)


def _unwritable(tensor: torch.Tensor, device: torch.device | None) -> str:
    if tensor.is_meta and device is None:
        return "lies on the meta device; say where it shall be made real with device="
    if tensor.layout is not torch.strided:
        return f"has the layout {tensor.layout}; by name only strided tensors are written"
    if type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        return f"is a {type(tensor).__name__}, which has no plain bytes; by name only plain tensors are written"
    strides = tensor.stride()
    if 0 in strides and any(s == 0 and n > 1 for n, s in zip(tensor.shape, strides, strict=True)):
        return "is an expanded tensor, several elements of which share memory"
    return ""


_HARMLESS = ("torch.nn.modules.batchnorm", "torch.nn.modules.instancenorm")  # They fill in counters of old files.


def hook_problems(model: nn.Module) -> Iterator[str]:
    """Modules whose ``load_state_dict`` does more than copy by name: by name that would be skipped, in silence."""
    cure = "load_state_dict runs it, loading by name does not"
    if not _loads_by_name(model):
        yield f"module {type(model).__name__}: has a load_state_dict of its own; loading by name does not run it"
    seen: set[int] = set()
    own: dict[type, bool] = {}
    stack = [("", model)]
    while stack:
        dot, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        stack += [(f"{dot}{key}.", child) for key, child in module._modules.items() if child is not None]
        kind = type(module)
        if kind not in own:
            own[kind] = _has_loading_code(kind)
        if own[kind]:
            yield f"module {dot[:-1] or kind.__name__}: {kind.__name__} has loading code of its own; {cure}"
        if module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks:
            yield f"module {dot[:-1] or kind.__name__}: has a hook around loading; {cure}"


def _loads_by_name(model: nn.Module) -> bool:
    return getattr(model.load_state_dict, "__func__", None) is nn.Module.load_state_dict


def _has_loading_code(kind: type[nn.Module]) -> bool:
    override = kind._load_from_state_dict
    return override is not nn.Module._load_from_state_dict and override.__module__ not in _HARMLESS


def extra_state_problems(model: nn.Module) -> Iterator[str]:
    """Modules with state that is no tensor: no safetensors file carries it, and by name it would stay as it is."""
    for name, module in model.named_modules():
        if type(module).set_extra_state is not nn.Module.set_extra_state:
            yield f"module {name or type(model).__name__}: keeps extra state; by name it would stay as it is"


def materialise(
    found: Iterable[Place], names: Container[str], device: torch.device
) -> list[tuple[Place, torch.Tensor]]:
    """Replace the meta tensors with these names by uninitialised ones on ``device``, tied ones by one under all names.

    Keeps classes, attributes and ``requires_grad``. Returns what was replaced, so that it can be put back.
    """
    found = list(found)
    made = {
        id(place.tensor): _real(place.tensor, device) for place in found if place.name in names and place.tensor.is_meta
    }
    replaced = [(place, place.tensor) for place in found if id(place.tensor) in made]
    for place, old in replaced:
        place.put(made[id(old)])
    return replaced


def _real(old: torch.Tensor, device: torch.device) -> torch.Tensor:
    new = torch.empty_like(old, device=device)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
        if type(old) is not nn.Parameter:
            new = new.as_subclass(type(old))
    new.__dict__.update(old.__dict__)
    return new
