"""Options: what ``model_loader_extra_config`` may say, checked before anything is loaded. It loads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from ...errors import UnknownName, UsageError
from ...loading.verify import Verify
from ...memory.guards import Guard


@dataclass(frozen=True, slots=True)
class Options:
    """How one model is loaded and updated.

    Attributes:
        memory_limit: bytes of device memory that half-filled layers may take together, see ``LiveModel``.
        guard: what happens to memory that was given back. With one, files are streamed and not read in place.
        threads: how many threads read files.
        verify: ``"loader"`` lets the model's own code load each layer once more, and compares the bits.
        allow_missing: names of the model that may stay as they are, beside those that vLLM allows.
        allow_unexpected: names of the checkpoint that may have no place.
    """

    memory_limit: int | None = None
    guard: Guard = "off"
    threads: int | None = None
    verify: Verify = "off"
    allow_missing: tuple[str, ...] = ()
    allow_unexpected: tuple[str, ...] = ()


def options_from(config: object) -> Options:
    """The options that a load config carries.

    Raises:
        UsageError: one is unknown, or of the wrong kind; the message says what is known.
    """
    if not isinstance(config, Mapping):
        raise UsageError(f"model_loader_extra_config is a dict; found {type(config).__name__}")
    known = [field.name for field in fields(Options)]
    for key in config:
        if key not in known:
            raise UnknownName("key of model_loader_extra_config", key, known)
    return Options(**{key: _checked(key, value) for key, value in config.items()})


def _checked(key: str, value: Any) -> Any:
    if key in _CHOICES:
        if value not in get_args(_CHOICES[key]):
            raise UnknownName(f"{key} in model_loader_extra_config", value, get_args(_CHOICES[key]))
        return value
    if key in ("memory_limit", "threads"):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UsageError(f"{key} in model_loader_extra_config is a positive whole number; found {value!r}")
        return value
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(one, str) for one in names):
        raise UsageError(f"{key} in model_loader_extra_config is a pattern of names, or several; found {value!r}")
    return tuple(names)


_CHOICES = {"guard": Guard, "verify": Verify}
