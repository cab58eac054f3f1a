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
            (number, one.name)
            for number, one in enumerate(arguments)
            if one.alias_info is not None and one.alias_info.is_write
        )
        view = not writes and any(one.alias_info is not None for one in func._schema.returns)
        known = _SCHEMAS[func] = (writes, view)
    return known


def written_by(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation writes to."""
    found: list[torch.Tensor] = []
    for number, name in _schema(func)[0]:
        value = args[number] if number < len(args) else kwargs.get(name)
        found += [
            one for one in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(one, torch.Tensor)
        ]
    return found


def is_view(func: Any) -> bool:
    """Whether it gives a view of an operand and writes nothing."""
    return _schema(func)[1]


_TRIED = 1 << 30  # bytes; an operation on more than this is not tried for its error


def fails_really(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation that failed without data fails with data too: then the loading code would see that error."""
    metas = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
    if sum(one.nbytes for one in metas) > _TRIED:
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
