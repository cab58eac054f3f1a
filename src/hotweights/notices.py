"""Notices: what a person is told in passing. Telling never breaks what it tells of: standard error may be gone."""

from __future__ import annotations

import contextlib
import logging
import warnings

_LOGGER = logging.getLogger("hotweights")


def log(level: int, message: str, *parts: object) -> None:
    """Log a message, with ``%s`` for the parts."""
    # logging itself survives a standard error that is None or full, but raises if it is closed.
    with contextlib.suppress(Exception):
        _LOGGER.log(level, message, *parts, stacklevel=2)


def log_if_heard(level: int, message: str, *parts: object) -> None:
    """Log what is raised, too. Where nobody has set up logging, Python would print it beside the exception."""
    if _LOGGER.hasHandlers():
        log(level, message, *parts)


def forgotten(message: str, what: object) -> None:
    """Warn that ``what`` was not closed. For its ``__del__``, which closes it whatever happens here.

    Raises:
        ResourceWarning: if warnings are errors.
    """
    try:
        warnings.warn(message, ResourceWarning, source=what, stacklevel=3)
    except Warning:
        raise
    except Exception:
        return
