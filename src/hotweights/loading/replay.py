"""Replay: a program's recorded operations on real tensors. The table of memories, and views into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from ..boxes import Box, Memory, Region, view
from ..plan.steps import Program


class _Table:
    """Where each memory of a program lies while it runs."""

    def __init__(
        self,
        sources: Mapping[str, torch.Tensor],
        constants: Mapping[str, torch.Tensor],
        model: Callable[[str], torch.Tensor],
    ) -> None:
        self._sources = sources
        self._constants = constants
        self._model = model
        self._found: dict[Memory, torch.Tensor] = {}

    def __getitem__(self, region: Region) -> torch.Tensor:
        memory = region.memory
        tensor = self._found.get(memory)
        if tensor is None:
            tensor = self._found[memory] = self._find(memory)
        return view(tensor, region.box)

    def _find(self, memory: Memory) -> torch.Tensor:
        if memory.kind == "source":
            return self._sources[memory.name]
        if memory.kind == "constant":
            return self._constants[memory.name].clone()  # A program may write to it, and will run again.
        return self._model(memory.name)

    def put(self, region: Region, tensor: torch.Tensor) -> None:
        """Take a result. Where torch laid it out otherwise than the trace foresaw, it is laid out anew."""
        if region.memory in self._found:
            return  # a view of a result that is known
        box = region.box
        if tensor.stride() != box.stride or tensor.storage_offset() * tensor.element_size() != box.offset:
            laid = torch.empty(_reach(box), dtype=torch.uint8, device=tensor.device)
            tensor = view(laid, box).copy_(tensor)
        self._found[region.memory] = _first(tensor)


def _first(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's storage from its first byte on, as a tensor of no particular shape."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _reach(box: Box) -> int:
    last = sum((length - 1) * stride for length, stride in zip(box.shape, box.stride, strict=True))
    return box.offset + (last + 1) * box.dtype.itemsize if box.numel else box.offset


def run_program(
    program: Program,
    sources: Mapping[str, torch.Tensor],
    constants: Mapping[str, torch.Tensor],
    model: Callable[[str], torch.Tensor],
) -> None:
    """Do the operations of ``program``; what they write to the model is written in place.

    Args:
        program: what to do.
        sources: contiguous tensors by name, the program's own: it may change them.
        constants: by name; they are not changed.
        model: the model's tensor of that name.
    """
    table = _Table(sources, constants, model)
    with _no_autocast():
        _run(program, table)


@contextmanager
def _no_autocast() -> Iterator[None]:
    """The caller's autocast was none of the loading code's."""
    with ExitStack() as stack:
        if torch._C._is_any_autocast_enabled():
            for kind in ("cpu", "cuda", "xpu", "mps"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _run(program: Program, table: _Table) -> None:
    for op in program.ops:
        args, kwargs = _decoded(op.args, table), _decoded(op.kwargs, table)
        out = op.func(*args, **kwargs)
        if op.results:
            operands = {id(value) for value in tree_flatten((args, kwargs))[0]}
            fresh = (one for one in tree_flatten(out)[0] if isinstance(one, torch.Tensor) and id(one) not in operands)
            for region, tensor in zip(op.results, fresh, strict=True):
                table.put(region, tensor)


def _decoded(value: Any, table: _Table) -> Any:
    if isinstance(value, Region):
        return table[value]
    if isinstance(value, (list, tuple)):
        return type(value)(_decoded(one, table) for one in value)
    if isinstance(value, dict):
        return {key: _decoded(one, table) for key, one in value.items()}
    return value
