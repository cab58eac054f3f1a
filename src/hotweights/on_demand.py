"""On demand: names of a package whose files are imported when somebody asks for the name, not before (PEP 562).

``import hotweights`` takes milliseconds so. With torch, which almost every file needs, it would take seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def on_demand(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """A ``__getattr__`` for the module ``package``; ``homes`` says in which of its files each name lies."""

    def find(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f".{homes[name]}", package), name)
        setattr(sys.modules[package], name, value)  # The next look is as fast as any.
        return value

    return find
