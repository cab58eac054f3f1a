"""The model that a command is about: of transformers by its configuration, or what a factory makes."""

from __future__ import annotations

import os
import re
import sys
from difflib import get_close_matches
from importlib import import_module
from importlib.machinery import PathFinder
from traceback import extract_tb

import torch
from torch import nn

from ..engines import transformers
from ..engines.build import move_real, parameters_to_meta
from ..errors import UsageError

_FACTORY = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<name>[^\W\d]\w*(\.[^\W\d]\w*)*)")


_NEARLY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+|[^:]+\.py(:.*)?")


def model_from(text: str, dtype: torch.dtype | None = None, *, device: str | None = None) -> nn.Module:
    """The model, on meta: ``text`` is a directory with a ``config.json``, or ``package.module:factory``.

    With a ``device`` a factory's buffers are real and lie there, as ``hotweights.build`` makes them: those that no
    checkpoint carries have their values.

    Raises:
        UsageError: there is no such factory, a dtype is given for one, it fails, or it makes no model.
        CheckpointError: there is no usable configuration.
    """
    if not os.path.exists(text) and (_NEARLY.fullmatch(text) or _is_module(text)):
        raise UsageError(f"--model {text}: there is no such directory; of a factory write package.module:factory")
    match = _FACTORY.fullmatch(text)
    if match is None or os.path.exists(text):
        model: nn.Module = transformers.build(text, dtype=dtype)
        return model
    if dtype is not None:
        raise UsageError(f"--dtype is for a config.json; --model {text} makes its own; leave it out")
    factory = _found(match["module"], match["name"])
    try:
        with torch.device("meta") if device is None else parameters_to_meta():
            made = factory()  # type: ignore[operator]
    except Exception as error:  # It is anybody's code.
        how = "on meta " if device is None else ""
        raise UsageError(
            f"--model {text}: calling it {how}without arguments failed{_place_of(error)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"--model {text}: a factory gives a torch.nn.Module; this gave a {type(made).__name__}")
    if device is not None:
        move_real(made, torch.device(device))
    return made


def _is_module(text: str) -> bool:
    """Whether it names a module that can be imported from here."""
    path = [os.getcwd(), *sys.path]
    return text.isidentifier() and PathFinder.find_spec(text, path) is not None


def _place_of(error: BaseException) -> str:
    """The file and line that raised it."""
    frames = extract_tb(error.__traceback__)[1:]  # The first is ours.
    return f", {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _found(module: str, name: str) -> object:
    path = sys.path.copy()
    sys.path.insert(0, os.getcwd())  # A script that pip installed does not look where it is started.
    try:
        found: object = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UsageError(f"--model {module}:{name}: importing it failed: {error}") from error
        raise UsageError(
            f"--model {module}:{name}: there is no module {error.name} here. Start this where "
            f"`python -c 'import {module}'` works"
        ) from error
    except Exception as error:
        raise UsageError(f"--model {module}:{name}: importing it failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path[:] = path
    for part in name.split("."):
        if not hasattr(found, part):
            close = get_close_matches(part, [word for word in dir(found) if callable(getattr(found, word, None))])
            similar = f"; similar: {', '.join(close)}" if close else ""
            raise UsageError(f"--model {module}:{name}: there is no {part!r} in it{similar}")
        found = getattr(found, part)
    return found
