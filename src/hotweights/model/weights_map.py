"""Weights map: where accelerate's hooks keep the tensors of offloaded modules, and what else holds their values.

The modules' own tensors are on meta then, but during a forward; or they hold what the next forward replaces.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..memory.aliases import plain
from ..memory.extents import Extents
from ..signals import held

_Slot = tuple[int, str]


class Offloaded(NamedTuple):
    """What hooks keep of a model, where it can be written.

    Attributes:
        tensors: those with which the next forward computes, by the id of the module that has them and their key there.
        copies: pairs of a tensor and what holds its values too: they come back when the hooks are taken off.
        hooks: ids of the hooks that keep them.
        reasons: why what other hooks of accelerate keep cannot be written, by the module's name.
    """

    tensors: dict[_Slot, torch.Tensor]
    copies: list[tuple[torch.Tensor, torch.Tensor]]
    hooks: set[int]
    reasons: dict[str, str]

    @held  # Else a signal might leave autograd off.
    def renew_copies(self, written: Iterable[torch.Tensor]) -> None:
        """Copy the values of those that share a byte with what was written."""
        if self.copies:
            extents = Extents(written)
            with torch.no_grad():
                for tensor, copy in self.copies:
                    if extents.meets(tensor):
                        copy.copy_(tensor)


def offloaded(hooked: Iterable[tuple[str, nn.Module]]) -> Offloaded:
    """What the hooks of these modules keep. Outer ones come first: at a forward the innermost hook counts."""
    found = Offloaded({}, [], set(), {})
    values: list[tuple[_Slot, torch.Tensor]] = []
    for name, module in {id(module): (name, module) for name, module in hooked}.values():
        for hook in _aligning(module.__dict__["_hf_hook"]):
            try:
                kept = list(_kept(module, hook))
            except _Unwritable as error:
                found.reasons[name] = str(error)
                continue
            found.tensors.update((slot, now) for slot, now, _ in kept)
            values += [(slot, value) for slot, _, value in kept]
            found.hooks.add(id(hook))
    # A module with two names has two hooks: the last one's value counts, and the first one's comes back with both off.
    pairs = [(found.tensors[slot], value) for slot, value in values]
    found.copies.extend((tensor, copy) for tensor, copy in pairs if not Extents([tensor]).meets(copy))
    return found


class _Unwritable(Exception):
    pass


def _aligning(hook: Any) -> Iterator[Any]:
    """The hooks that offload, also inside one that holds several. Subclasses may do anything, so they are not known."""
    hooks = sys.modules.get("accelerate.hooks")
    if hooks is None:
        return
    if type(hook) is hooks.SequentialHook:
        for inner in hook.hooks:
            yield from _aligning(inner)
    elif type(hook) is hooks.AlignDevicesHook and hook.offload and hook.weights_map is not None:
        yield hook


def _kept(module: nn.Module, hook: Any) -> Iterator[tuple[_Slot, torch.Tensor, torch.Tensor]]:
    """Where a module has a tensor, with which tensor the next forward computes, and the value that the hook keeps."""
    deep = hook.place_submodules
    for key, own in module.named_parameters(recurse=deep, remove_duplicate=False):
        value = _value(hook.weights_map, key, own)
        if value is None:
            raise _Unwritable(f"and has no {key} to bring back")
        yield _slot(module, key)[0], _brought(hook, value), value
    for key, buffer in module.named_buffers(recurse=deep, remove_duplicate=False):
        slot, persistent = _slot(module, key)
        value = _value(hook.weights_map, key, buffer) if persistent else None
        if value is not None and hook.offload_buffers:
            yield slot, value, value
        elif value is not None and not buffer.is_meta:  # It stays, and the value comes back when the hook is taken off.
            yield slot, buffer, value


def _slot(module: nn.Module, key: str) -> tuple[_Slot, bool]:
    """Where a tensor is that the module or a part of it has, and whether the state dict has it."""
    prefix, _, last = key.rpartition(".")
    owner = module.get_submodule(prefix)
    return (id(owner), last), last not in owner._non_persistent_buffers_set


def _brought(hook: Any, value: torch.Tensor) -> torch.Tensor:
    """What a forward takes for this value: of tied parameters one is on the device already, and is taken for all."""
    tied = (hook.tied_params_map or {}).get(value.data_ptr(), {})
    brought = tied.get(hook.execution_device)
    return brought if isinstance(brought, torch.Tensor) else value


def _value(kept: Any, key: str, own: torch.Tensor) -> torch.Tensor | None:
    """What the map has for a tensor of the module; ``None`` if it has nothing. No file is read.

    Raises:
        _Unwritable: nothing that is written there would be read again.
    """
    hooks, loaders = sys.modules["accelerate.hooks"], sys.modules.get("accelerate.utils.offload")
    while type(kept) is hooks.PrefixedDataset:
        kept, key = kept.dataset, kept.prefix + key
    if loaders is not None and type(kept) is loaders.OffloadedWeightsLoader:
        if key not in kept.state_dict and key in kept.index:
            raise _Unwritable("on disk")
        kept = kept.state_dict
    if type(kept).__getitem__ is not dict.__getitem__:
        raise _Unwritable(f"in a {type(kept).__qualname__}, which may read files")
    value = kept.get(key)
    if value is None:
        return None
    if not isinstance(value, torch.Tensor) or not plain(value) or value.is_meta:
        raise _Unwritable(f"and {key} there is no tensor with plain bytes")
    if (value.dtype, value.shape) != (own.dtype, own.shape):
        raise _Unwritable(
            f"and {key} there is {value.dtype} of {list(value.shape)}, in the module {own.dtype} of {list(own.shape)}"
        )
    return value
