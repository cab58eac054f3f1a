"""Rename: what a caller says about the names of a source, and the names that come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from .errors import HotweightsError, PlanError, UsageError
from .failure import blame, called

Rename = Mapping[str, str] | Callable[[str], str]
"""New names: prefixes and what stands in their place (the longest that fits counts), or a function of a name."""


def renamer(rename: Rename) -> Callable[[str], str]:
    """A function that gives the new name of a name.

    Raises:
        UsageError: it is neither a mapping of prefixes nor a function.
    """
    if not isinstance(rename, Mapping):
        if callable(rename):
            return _telling(rename)
        raise UsageError(f"rename= is a mapping of prefixes or a function of a name; found {type(rename).__name__}")
    if strangers := [pair for pair in rename.items() if not all(isinstance(text, str) for text in pair)]:
        before, after = strangers[0]
        raise UsageError(f"rename= maps prefixes to prefixes, both str; found {before!r}: {after!r}")
    prefixes = sorted(rename.items(), key=lambda pair: -len(pair[0]))

    def renamed(name: str) -> str:
        for before, after in prefixes:
            if name.startswith(before):
                return after + name[len(before) :]
        return name

    return renamed


def _telling(rename: Callable[[str], str]) -> Callable[[str], str]:
    """The same function; its errors say that it raised them, and for which name."""

    def renamed(name: str) -> str:
        try:
            return rename(name)
        except HotweightsError:  # It says itself what is wrong: an engine's own renaming, of which no caller knows.
            raise
        except Exception as error:
            blame(error, f"rename={called(rename)} for {name!r}")
            raise

    return renamed


def new_names(names: Iterable[str], rename: Rename | None) -> dict[str, str]:
    """The new name of each name. No two have the same.

    Raises:
        PlanError: some have no new name that can be one, or the same; the problems give old and new names.
        UsageError: ``rename`` is of the wrong kind.
    """
    if rename is None:
        return {name: name for name in names}
    new = renamer(rename)
    origins: dict[str, str] = {}
    problems = []
    for name in names:
        fresh = new(name)
        if why := unusable(name, fresh):
            problems.append(why)
        elif fresh in origins:
            problems.append(both_become(origins[fresh], name, fresh))
        else:
            origins[fresh] = name
    if problems:
        raise PlanError("rename= gives no name of its own to some tensors; nothing was read or written", problems)
    return {name: fresh for fresh, name in origins.items()}


def unusable(name: str, fresh: object) -> str | None:
    """Why a tensor cannot have its new name; ``None`` if it can."""
    if isinstance(fresh, str) and fresh and not fresh.startswith("."):
        return None
    if not isinstance(fresh, str):
        return f"{name} would become {fresh!r}; a function returns the new name, or the same where it is to stay"
    return f"{name} would become {fresh!r}; a prefix ends with its dot"


def both_become(first: str, second: str, fresh: str) -> str:
    """What is wrong when two tensors get one name."""
    return f"{min(first, second)} and {max(first, second)} both become {fresh}"
