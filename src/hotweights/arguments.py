"""Arguments: what callers give to public functions is checked here, before anything is done with it."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

from .errors import UnknownName, UsageError

if TYPE_CHECKING:  # Commands that need no torch do not wait for its import.
    import torch


def check_model(model: object, source: object = None) -> None:
    """Raise ``UsageError`` unless it is a module that shows its tensors and its code."""
    import torch
    from torch import nn

    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            "this model is a TorchScript module, which does not show its loading code; load the module that it was "
            "made from, and script or trace that afterwards"
        )
    if not isinstance(model, nn.Module):
        swapped = isinstance(model, (str, os.PathLike, Mapping)) and isinstance(source, nn.Module)
        cure = "; the model comes first, then the source" if swapped else ""
        if type(model).__name__ == "LiveModel":
            cure = ": live.update(source) loads it, live.plan and live.explain(name) tell of it; live.model is a module"
        raise UsageError(f"a model is a torch.nn.Module; found {shown(model)}{cure}")


def check_choices(**options: tuple[object, Any]) -> None:
    """Raise ``UnknownName`` for an option that has no value of its ``Literal``: ``check_choices(io=(io, IOMode))``."""
    for name, (value, known) in options.items():
        if not isinstance(value, str) or value not in get_args(known):
            raise UnknownName(name, value, get_args(known))


def check_kind(what: str, value: object, kind: type | tuple[type, ...], words: str) -> None:
    """Raise ``UsageError`` unless ``value`` is ``None`` or of this kind, which ``words`` describe."""
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise UsageError(f"{what}= is {words}; found {shown(value)}")


def check_path(path: object) -> None:
    """Raise ``UsageError`` for the empty path, which ``Path`` takes for the current directory."""
    if path in ("", b""):
        raise UsageError("the path is empty; is a variable not set? The current directory is '.'")


def check_count(least: int, **options: object) -> None:
    """Raise ``UsageError`` for an option that is no whole number of at least ``least``."""
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(f"{name}= is a whole number of at least {least}; found {shown(value)}")


def nbytes_from(**option: object) -> int:
    """The bytes that an option says, as a number or such as ``"5GB"`` or ``"500MiB"``; at least one.

    Raises:
        UsageError: it is none of these.
    """
    ((name, value),) = option.items()
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", str(value), re.IGNORECASE)
    if isinstance(value, bool) or match is None:
        raise UsageError(f'{name}= is a number of bytes, or such as "5GB" or "500MiB"; found {value!r}')
    unit = units[match[2].upper()]
    nbytes = int(float(match[1]) * (1024 ** round(math.log10(unit) / 3) if match[3] else unit))
    if nbytes < 1:
        raise UsageError(f"{name}= is at least one byte; found {value!r}")
    return nbytes


def check_seconds(*, or_zero: bool = False, **options: object) -> None:
    """Raise ``UsageError`` for an option that is no number of seconds, above zero or from zero on."""
    for name, value in options.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and (value > 0 or (or_zero and value == 0))):  # type: ignore[operator]
            raise UsageError(f"{name}= is {'at least' if or_zero else 'more than'} 0 s; found {shown(value)}")


def check_flags(**options: object) -> None:
    """Raise ``UsageError`` for an option that is not ``True``, ``False`` or ``None``."""
    for name, value in options.items():
        if value is not None and not isinstance(value, bool):
            raise UsageError(f"{name}= is True, False or None; found {shown(value)}")


def check_callable(**options: object) -> None:
    """Raise ``UsageError`` for an option that is neither ``None`` nor a function."""
    for name, value in options.items():
        if value is not None and not callable(value):
            raise UsageError(f"{name}= is a function, or None; found {shown(value)}")


def check_takes_one(called: str, function: Callable[..., object], argument: str) -> None:
    """Raise ``UsageError`` for a function that is async, or that cannot be called with one argument, ``argument``."""
    name = getattr(function, "__qualname__", repr(function))
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        raise UsageError(
            f"{called} {name} is async, and nobody would await it; give a function that is not. Where it must reach an "
            "event loop: asyncio.run_coroutine_threadsafe(work(), loop)"
        )
    if not takes_one(function):
        takes = inspect.signature(function)
        raise UsageError(f"{called} {name} is called with one argument, {argument}; it takes {takes}")


def takes_one(function: Callable[..., object]) -> bool:
    """Whether it can be called with one argument; also where nothing tells."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # A builtin without a signature.
        return True
    return True


def check_timeout(timeout: object) -> None:
    """Raise ``UsageError`` unless it is a number of seconds, 0 or more, or ``None``: without a limit."""
    check_kind("timeout", timeout, (int, float), "seconds, or None for no limit")
    if isinstance(timeout, (int, float)) and not timeout >= 0:
        raise UsageError(f"timeout= is 0 seconds or more; found {timeout:g}")


def patterns_from(**options: object) -> list[list[str | re.Pattern[str]]]:
    """The patterns of each option, in the options' order. An option is one pattern or several."""
    return [list(_patterns(name, value)) for name, value in options.items()]


def _patterns(name: str, value: object) -> Iterator[str | re.Pattern[str]]:
    for pattern in value if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)) else [value]:
        if not isinstance(pattern, (str, re.Pattern)):
            raise UsageError(f"{name}= is a pattern of names, or several; found {shown(pattern)}")
        yield pattern


def device_from(device: torch.device | str | int | None) -> torch.device | None:
    """The device on which meta tensors are made real. Raises ``UsageError`` if no tensor can be made there."""
    if device is None:
        return None
    import torch

    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except Exception as error:  # Every backend has its own way of not being there.
        raise UsageError(f"device={device!r} is no device that can be used here: {_first_line(error)}") from error
    if target.type == "meta":
        raise UsageError("device= says where meta tensors are made real; on 'meta' they would not be")
    return target


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def shown(value: object) -> str:
    """How an error shows a value: short ones as they are, others by their type."""
    if isinstance(value, (str, int, float, bytes, os.PathLike, type, type(None))):
        return repr(value)
    return type(value).__name__


def check_version(version: object) -> None:
    """Raise ``UsageError`` unless it can name a version, or is ``None``."""
    if version is not None and (not isinstance(version, (str, int)) or isinstance(version, bool)):
        name = getattr(version, "name", None)
        cure = f"; give its name, version={name!r}, or leave version= out" if isinstance(name, str) else ""
        raise UsageError(f"a version is a str or an int; this is a {type(version).__name__}{cure}")
    if version == "":
        raise UsageError('a version\'s name is not empty; found "". Leave version= out for the number of commits')
