"""Owners: whether another live model has loaded a module. Each knows its own readers, versions and updates only."""

from __future__ import annotations

from weakref import WeakKeyDictionary, ref

from torch import nn

from .state import Current

_LOADED: WeakKeyDictionary[nn.Module, ref[Current]] = WeakKeyDictionary()


def own(model: nn.Module, current: Current) -> tuple[str, ...]:
    """Note whose the module is from now on. Returns a warning where it was another's, who lives still."""
    before = _LOADED.get(model)
    other = None if before is None else before()
    _LOADED[model] = ref(current)
    if other is None or other is current or other.version is None:
        return ()
    return (
        f"another LiveModel has loaded this {type(model).__name__}, as version {other.version!r}, and knows nothing of "
        "this one: its readers are not waited for, and its update or rollback would end in tensors of both. Keep one",
    )
