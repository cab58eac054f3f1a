"""Place: where a module keeps a tensor of its state dict. Also the tensors of a model as targets of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec
import torch
from torch import nn

from ..manifest import TensorSpec
from ..memory.aliases import owners, spots
from ..plan.steps import Target
from ..sharding import Part
from ..shell import Shell
from .walk import modules_of

_NO_PARTS: Mapping[str, Part] = {}
_NO_SHELLS: Mapping[str, Shell] = {}


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
    """Every parameter and buffer, once for each of its names, in the order of the state dict."""
    for prefix, module in modules_of(model):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield Place(prefix + key, module, key, persistent=True)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                yield Place(prefix + key, module, key, persistent=key not in module._non_persistent_buffers_set)


def targets_of(
    tensors: Mapping[str, torch.Tensor],
    device: torch.device | None,
    parts: Mapping[str, Part] = _NO_PARTS,
    shells: Mapping[str, Shell] = _NO_SHELLS,
) -> dict[str, Target]:
    """The tensors as targets of a plan; ``device`` is where meta tensors will be made real.

    Of those in ``parts`` this rank has no more than the part; those in ``shells`` lie in wrappers.
    """
    owner, spot = owners(tensors), spots(tensors)
    targets = {name: _described(tensor, name, owner[name], device) for name, tensor in tensors.items()}
    for name, (memory, start) in spot.items():
        targets[name] = msgspec.structs.replace(targets[name], memory=memory, start=start)
    for name in parts.keys() & targets.keys():
        targets[name] = _partial(targets[name], tensors[name], parts[name])
    for name in shells.keys() & targets.keys():
        targets[name] = _inside(targets[name], tensors[name], shells[name])
    return targets


def _inside(target: Target, tensor: torch.Tensor, shell: Shell) -> Target:
    problem = target.problem
    if tensor.is_meta:
        problem = (
            f"lies on the meta device, where no {shell.kind.rpartition('.')[2]} can be made real; quantise a real "
            "model, or put the source's own tensors there by torch's load_state_dict(..., assign=True)"
        )
    spec = msgspec.structs.replace(target.spec, shell=shell)
    return msgspec.structs.replace(target, spec=spec, problem=problem)


def _described(tensor: torch.Tensor, name: str, owner: str, device: torch.device | None) -> Target:
    if nn.parameter.is_lazy(tensor):
        return Target(TensorSpec(name, tensor.dtype, ()), owner, "is uninitialised; run the model once first")
    if tensor.is_nested:
        return Target(
            TensorSpec(name, tensor.dtype, ()), owner, "is a nested tensor; by name only plain tensors are written"
        )
    stride = None if tensor.layout is not torch.strided or tensor.is_contiguous() else tensor.stride()
    return Target(TensorSpec(name, tensor.dtype, tuple(tensor.shape)), owner, _unwritable(tensor, device), stride)


def _partial(target: Target, tensor: torch.Tensor, part: Part) -> Target:
    problem = f"is a DTensor, and {part.problem}; by name only parts are written" if part.problem else target.problem
    if tensor.is_meta:
        problem = "is a DTensor on the meta device; make it real first, by model.to_empty(device=...)"
    return msgspec.structs.replace(target, memory="", start=0, problem=problem, part=part)


def _unwritable(tensor: torch.Tensor, device: torch.device | None) -> str:
    if tensor.is_meta and device is None:
        return "lies on the meta device; say where it shall be made real with device="
    if tensor.layout is not torch.strided:
        return f"has the layout {tensor.layout}; by name only strided tensors are written"
    if tensor.is_quantized:
        return "is quantised by torch.quantize_per_tensor or its like; by name only plain tensors are written"
    if type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        return f"is a {type(tensor).__name__}, which has no plain bytes; by name only plain tensors are written"
    if tensor.is_conj() or tensor.is_neg():
        return "is a conjugated or negated view, whose bytes are no values; put its resolve_conj().resolve_neg() there"
    if tensor.is_contiguous():
        return ""
    strides = tensor.stride()
    if any(s == 0 and n > 1 for n, s in zip(tensor.shape, strides, strict=True)):
        return "is an expanded tensor, several elements of which share memory"
    return ""
