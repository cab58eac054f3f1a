"""Patterns: names of tensors as a user writes them."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import takewhile

Patterns = str | re.Pattern[str] | Iterable[str | re.Pattern[str]]
"""Names of tensors: a string is a shell pattern over the whole name (``*.inv_freq``), an expression is searched for."""


_TYPED = 3  # Longer lists are no advice that people would type.


def matches(patterns: Patterns) -> Callable[[str], bool]:
    """A predicate that says whether a name matches any of ``patterns``."""
    several = _several(patterns)
    # A name may hold brackets of its own; as itself it always matches.
    literal = {pattern for pattern in several if isinstance(pattern, str)}
    tests = [
        re.compile(fnmatch.translate(pattern)).match if isinstance(pattern, str) else pattern.search
        for pattern in several
    ]
    return lambda name: name in literal or any(test(name) for test in tests)


def idle(names: Collection[str], **patterns: Patterns) -> list[str]:
    """What is said of patterns, given by the argument that takes them, that match none of the names."""
    said = []
    for option, several in patterns.items():
        for pattern in _several(several):
            if any(map(matches(pattern), names)):
                continue
            near = get_close_matches(pattern, names, n=1) if isinstance(pattern, str) else []
            similar = f"; similar: {near[0]}" if near else ""
            said.append(f"{option}={pattern!r} matches no tensor of the model or the checkpoint{similar}.")
    return said


def both(first: Patterns, second: Patterns) -> list[str | re.Pattern[str]]:
    """The patterns of either."""
    return [*_several(first), *_several(second)]


def widened(patterns: Patterns, others: Mapping[str, tuple[str, ...]]) -> Patterns:
    """The patterns, and the names that they match only by one of their ``others``."""
    match = matches(patterns)
    return both(patterns, [name for name, several in others.items() if not match(name) and any(map(match, several))])


def narrowest(names: Sequence[str]) -> str:
    """One pattern for all these names: the only one itself, or what they all begin with, up to a dot, and a star."""
    if len(set(names)) == 1:
        return names[0]
    # Between the first and the last in order, every name begins with what these two have in common.
    first, last = min(names).split("."), max(names).split(".")
    common = list(takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    return ".".join([*(part for part, _ in common), "*"])


def typed(names: Collection[str], others: Iterable[str]) -> str:
    """These names as somebody would type them for an argument that takes patterns: ``"*.scale"``, or a few as they are.

    A pattern matches none of the ``others``; empty where these names are many and have no such pattern.
    """
    if len(names) == 1:
        return json.dumps(min(names))
    if len(names) <= _TYPED:
        return json.dumps(sorted(names))
    others = [name for name in others if name not in names]
    reversed_names = [".".join(reversed(name.split("."))) for name in names]
    ending = ".".join(reversed(narrowest(reversed_names).split(".")))
    for pattern in (ending, narrowest(sorted(names))):
        if pattern != "*" and not any(map(matches(pattern), others)):
            return json.dumps(pattern)
    return ""


def _several(patterns: Patterns) -> list[str | re.Pattern[str]]:
    return [patterns] if isinstance(patterns, (str, re.Pattern)) else list(patterns)
