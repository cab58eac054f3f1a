"""Arguments: what callers hand to the public functions, checked before anything is done with it. It changes nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

import torch
from torch import nn

from .errors import UnknownName, UsageError


def check_model(model: object, source: object = None) -> None:
    """A model is a module that shows its tensors and its code."""
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            "this model is a TorchScript module, which does not show its loading code; load the module that it was "
            "made from, and script or trace that afterwards"
        )
    if not isinstance(model, nn.Module):
        swapped = isinstance(model, (str, os.PathLike, Mapping)) and isinstance(source, nn.Module)
        cure = "; the model comes first, then the source" if swapped else ""
        raise UsageError(f"a model is a torch.nn.Module; found {_words(model)}{cure}")


def check_choices(**options: tuple[object, Any]) -> None:
    """Each option, given with the ``Literal`` that lists its values, has one of them."""
    for name, (value, known) in options.items():
        if value not in get_args(known):
            raise UnknownName(name, value, get_args(known))


def check_kind(what: str, value: object, kind: type | tuple[type, ...], words: str) -> None:
    """``value`` is ``None`` or of this kind; ``words`` say which that is."""
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise UsageError(f"{what}= is {words}; found {_words(value)}")


def patterns_from(**options: object) -> list[list[str | re.Pattern[str]]]:
    """The patterns of each option, which is one or several, in order."""
    return [list(_patterns(name, value)) for name, value in options.items()]


def _patterns(name: str, value: object) -> Iterator[str | re.Pattern[str]]:
    for one in value if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)) else [value]:
        if not isinstance(one, (str, re.Pattern)):
            raise UsageError(f"{name}= is a pattern of names, or several; found {_words(one)}")
        yield one


def device_from(device: torch.device | str | int | None) -> torch.device | None:
    """The device that meta tensors shall be made real on, seen to be one that holds tensors."""
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except Exception as error:  # Every backend has its own way of not being there.
        raise UsageError(f"device={device!r} is no device that can be used here: {_first_line(error)}") from error
    if found.type == "meta":
        raise UsageError("device= says where meta tensors are made real; on 'meta' they would not be")
    return found


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _words(value: object) -> str:
    if isinstance(value, (str, int, float, bytes, os.PathLike, type, type(None))):
        return repr(value)
    return type(value).__name__


def check_version(version: object) -> None:
    """Raises ``UsageError`` for what cannot name a version."""
    if version is not None and (not isinstance(version, (str, int)) or isinstance(version, bool)):
        raise UsageError(f"a version is a str or an int; this is a {type(version).__name__}")
