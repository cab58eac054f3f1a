"""LoaderOptions: what ``model_loader_extra_config`` may say, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...arguments import check_choices, check_flags
from ...errors import UnknownName, UsageError
from ...loading.verify import Verify


@dataclass(frozen=True, slots=True)
class LoaderOptions:
    """How one model is loaded and updated.

    Attributes:
        memory_limit: bytes of device memory that half-filled layers may take together, see ``LiveModel``.
        threads: how many threads read files.
        verify: ``"loader"`` lets the model's own loading code load each layer once more, and compares bits.
        allow_missing: names of the model that may stay as they are, beside those for which vLLM has defaults.
        allow_unexpected: names of the checkpoint that may have no place.
        dummy: read no weights, only what the checkpoint's headers say: the first update brings the values.
        keys: the directory where this host has the keys of the job, for updates from senders on other hosts.
    """

    memory_limit: int | None = None
    threads: int | None = None
    verify: Verify = "off"
    allow_missing: tuple[str, ...] = ()
    allow_unexpected: tuple[str, ...] = ()
    dummy: bool = False
    keys: str | None = None


def options_from(config: object) -> LoaderOptions:
    """The options that a load config carries.

    Raises:
        UsageError: one is unknown, or of the wrong kind; the message says what is known.
    """
    if not isinstance(config, Mapping):
        raise UsageError(f"model_loader_extra_config is a dict; found {type(config).__name__}")
    known = [field.name for field in fields(LoaderOptions)]
    for key in config:
        if key not in known:
            raise UnknownName("key of model_loader_extra_config", key, known)
    return LoaderOptions(**{key: _checked(key, value) for key, value in config.items()})


def _checked(key: str, value: Any) -> Any:
    if key == "verify":
        check_choices(**{"verify in model_loader_extra_config": (value, Verify)})
        return value
    if key in ("memory_limit", "threads"):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UsageError(f"{key} in model_loader_extra_config is a positive whole number; found {value!r}")
        return value
    if key == "keys":
        if value is not None and (not isinstance(value, str) or not value):
            raise UsageError(f"keys in model_loader_extra_config is the path of a directory; found {value!r}")
        return value
    if key == "dummy":
        check_flags(**{"dummy in model_loader_extra_config": value})
        return value
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{key} in model_loader_extra_config is a pattern of names, or several; found {value!r}")
    return tuple(names)
