"""What torch's dispatcher says of an operation: what it writes, whether it is a view."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

_SCHEMAS: dict[Any, tuple[tuple[tuple[int, str], ...], bool]] = {}  # by overload: its written arguments; is it a view


def _schema(func: Any) -> tuple[tuple[tuple[int, str], ...], bool]:
    known = _SCHEMAS.get(func)
    if known is None:
        arguments = func._schema.arguments
        writes = tuple(
            (number, argument.name)
            for number, argument in enumerate(arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
        view = not writes and any(argument.alias_info is not None for argument in func._schema.returns)
        known = _SCHEMAS[func] = (writes, view)
    return known


def written_by(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation writes to."""
    tensors: list[torch.Tensor] = []
    for number, name in _schema(func)[0]:
        value = args[number] if number < len(args) else kwargs.get(name)
        tensors += [
            tensor
            for tensor in (value if isinstance(value, (list, tuple)) else (value,))
            if isinstance(tensor, torch.Tensor)
        ]
    return tensors


def is_view(func: Any) -> bool:
    """Whether it gives a view of an operand and writes nothing."""
    return _schema(func)[1]


_TRIED = 1 << 30  # bytes of operands; an operation on more is not tried


def fails_really(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation that failed without data fails with zeros too: then the error is the loading code's own."""
    metas = [meta for meta in tree_flatten((args, kwargs))[0] if isinstance(meta, torch.Tensor)]
    if sum(meta.nbytes for meta in metas) > _TRIED:
        return False

    def real(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return torch.zeros(value.shape, dtype=value.dtype, device="cpu") if isinstance(value, torch.Tensor) else value

    try:
        func(*tree_map(real, args), **tree_map(real, kwargs))
    except Exception:
        return True
    return False
