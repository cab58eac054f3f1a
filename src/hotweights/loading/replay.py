"""``run_program``: the recorded operations of a program, done again on real tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from ..boxes import Memory, Region, extent, view
from ..plan.steps import Program
from ..signals import held


class _Table:
    """Where each memory that a program names lies while it runs."""

    def __init__(
        self,
        sources: Mapping[str, torch.Tensor],
        constants: Mapping[str, torch.Tensor],
        model: Callable[[str], torch.Tensor],
    ) -> None:
        self._sources = sources
        self._constants = constants
        self._model = model
        self._memories: dict[Memory, torch.Tensor] = {}

    def __getitem__(self, region: Region) -> torch.Tensor:
        memory = region.memory
        tensor = self._memories.get(memory)
        if tensor is None:
            tensor = self._memories[memory] = self._find(memory)
        return view(tensor, region.box)

    def _find(self, memory: Memory) -> torch.Tensor:
        if memory.kind == "source":
            return self._sources[memory.name]
        if memory.kind == "constant":
            return self._constants[memory.name].clone()  # A program may write to it, and will run again.
        return self._model(memory.name)

    def put(self, region: Region, tensor: torch.Tensor) -> None:
        """Keep a result. If torch laid it out in another way than the trace foresaw, it is laid out anew."""
        if region.memory in self._memories:
            return  # a view of a result that is kept already
        box = region.box
        if tensor.stride() != box.stride or tensor.storage_offset() * tensor.element_size() != box.offset:
            memory = torch.empty(extent(box)[1], dtype=torch.uint8, device=tensor.device)
            tensor = view(memory, box).copy_(tensor)
        self._memories[region.memory] = _storage_of(tensor)


def _storage_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's storage from its first byte on, ``uint8``, as what regions are counted from."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


@held  # Else a signal might leave autocast off.
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
@held
def _no_autocast() -> Iterator[None]:
    """Inside, autocast is off: it is the caller's, and tracing recorded the operations without it."""
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
            outputs = (tensor for tensor in tree_flatten(out)[0] if isinstance(tensor, torch.Tensor))
            results = (tensor for tensor in outputs if id(tensor) not in operands)
            for region, tensor in zip(op.results, results, strict=True):
                table.put(region, tensor)


def _decoded(value: Any, table: _Table) -> Any:
    if isinstance(value, Region):
        return table[value]
    if isinstance(value, (list, tuple)):
        return type(value)(_decoded(item, table) for item in value)
    if isinstance(value, dict):
        return {key: _decoded(item, table) for key, item in value.items()}
    return value
