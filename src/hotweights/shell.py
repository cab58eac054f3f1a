"""Shell: what a wrapper tensor is besides the tensors inside it, in words that can be compared."""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import torch


class Shell(msgspec.Struct, frozen=True, gc=False):
    """The wrapper around a tensor, such as torchao's. Two wrappers are of one kind where no trait differs.

    Attributes:
        key: where the tensor lies in it, such as ``qdata``; that is the end of its name.
        kind: the wrapper's class.
        dtype: of the wrapper.
        shape: of the wrapper.
        traits: all else that its class needs to wrap the same tensors again, by name.
    """

    key: str
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    traits: tuple[tuple[str, str], ...]

    def outer(self, name: str) -> str:
        """The name of the wrapper, of which this tensor inside has the ``name``."""
        return name.removesuffix(f".{self.key}")

    def differences(self, other: Shell) -> Iterator[str]:
        """What differs but for the shape, as sentences that say the other one's first."""
        if self.kind != other.kind:
            yield f"{other.kind} expected, {self.kind} found"
            return
        if self.dtype != other.dtype:
            yield f"dtype {other.dtype} expected, {self.dtype} found"
        ours, theirs = dict(self.traits), dict(other.traits)
        for name in [*theirs, *(name for name in ours if name not in theirs)]:
            expected, found = theirs.get(name, "nothing"), ours.get(name, "nothing")
            if expected != found:
                yield f"{name} {expected} expected, {found} found"

    def __str__(self) -> str:
        return ", ".join([self.kind, str(self.dtype), *(f"{name} {value}" for name, value in self.traits)])


def outer_names(specs: Mapping[str, Any]) -> dict[str, str]:
    """For each name that of the tensor as its owner knows it: of what lies in a wrapper, the wrapper's.

    ``specs`` are those of a manifest, or shells; ``None`` has none.
    """
    return {
        name: name if (shell := getattr(spec, "shell", spec)) is None else shell.outer(name)
        for name, spec in specs.items()
    }


def renamed_inside(outer: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """The new name of each tensor, from those of what ``outer`` says that it lies in."""
    return {
        name: new.get(name, name) if name == whole else new.get(whole, whole) + name[len(whole) :]
        for name, whole in outer.items()
    }


def described(value: object, depth: int = 0) -> str:
    """A value as words: equal words are equal values. What cannot be seen into never has the words of another."""
    kind = type(value)
    if kind in _SPELLED:
        return repr(value)
    if isinstance(value, enum.Enum):
        return f"{kind.__qualname__}.{value.name}"
    if isinstance(value, type) or (isinstance(value, types.FunctionType) and _can_be_named(value)):
        return f"{value.__module__}.{value.__qualname__}"
    if depth < _DEPTH:
        inside = _inside(value)
        if inside is not None:
            name, parts = inside
            words = (f"{key}{described(part, depth + 1)}" for key, part in parts)
            return f"{name}[{', '.join(words)}]"
    return f"{kind.__qualname__} number {next(_UNSEEN)}, which cannot be compared"


_SPELLED = frozenset(
    (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)
)
_DEPTH = 6
_UNSEEN = itertools.count(1)


def _inside(value: object) -> tuple[str, list[tuple[str, object]]] | None:
    """What a container or an object consists of; ``None`` if nobody can say."""
    kind = type(value)
    if kind in (list, tuple, torch.Size):  # [1, 64] and (1, 64) mean the same to those who index them.
        assert isinstance(value, (list, tuple))
        return "", [("", part) for part in value]
    if kind is dict:
        assert isinstance(value, dict)
        return "", [(f"{described(key)}: ", part) for key, part in value.items()]
    if kind is functools.partial:
        assert isinstance(value, functools.partial)
        return "partial", [("", value.func), ("", value.args), ("", value.keywords)]
    if dataclasses.is_dataclass(value):
        return kind.__qualname__, [
            (f"{field.name}=", getattr(value, field.name)) for field in dataclasses.fields(value)
        ]
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return kind.__qualname__, [(f"{key}=", part) for key, part in zip(kind._fields, value, strict=True)]
    return None


def _can_be_named(function: types.FunctionType) -> bool:
    """Whether its module has it by its name: then the name says what it does."""
    here: object = sys.modules.get(function.__module__)
    for part in function.__qualname__.split("."):
        here = getattr(here, part, None)
    return here is function
