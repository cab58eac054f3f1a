"""Process calls: which layers somebody processes by ``process_weights_after_loading``, as loading code may."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import getattr_static
from types import FunctionType
from typing import Any

from torch import nn

from .. import signals

_WORD = "process_weights_after_loading"


@signals.held_throughout
class _Noted:
    """A class whose method is replaced while somebody's calls are noted; threads may load models at the same time."""

    def __init__(self, kind: type) -> None:
        self._kind, self._own, self._method = kind, _WORD in vars(kind), getattr(kind, _WORD)
        self.sinks: list[tuple[frozenset[nn.Module], list[nn.Module]]] = []
        method, sinks = self._method, self.sinks

        @wraps(method)
        def noting(*args: Any, **kwargs: Any) -> Any:
            for layers, found in tuple(sinks):
                modules = (value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module))
                found.extend(module for module in modules if module in layers)
            return method(*args, **kwargs)

        setattr(kind, _WORD, noting)

    def restore(self) -> None:
        if self._own:
            setattr(self._kind, _WORD, self._method)
        else:
            delattr(self._kind, _WORD)


_noted: dict[type, _Noted] = {}
_lock = threading.Lock()  # of the table; nobody's code runs under it


@contextmanager
@signals.held
def noting_calls(layers: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Inside, those of these layers are noted that somebody processes, by their own method or ``quant_method``'s."""
    own = frozenset(layers)
    found: list[nn.Module] = []
    sink = own, found
    kinds = {type(each) for layer in own for each in (layer, getattr(layer, "quant_method", None))}
    kinds = {kind for kind in kinds if isinstance(getattr_static(kind, _WORD, None), FunctionType)}
    with _lock:
        for kind in kinds:
            if kind not in _noted:
                _noted[kind] = _Noted(kind)
            _noted[kind].sinks.append(sink)
    try:
        yield found
    finally:
        with _lock:
            for kind in kinds:
                _noted[kind].sinks[:] = [each for each in _noted[kind].sinks if each is not sink]
                if not _noted[kind].sinks:
                    _noted.pop(kind).restore()
