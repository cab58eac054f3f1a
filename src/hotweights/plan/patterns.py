"""Patterns: names of tensors as a user writes them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable

Patterns = str | re.Pattern[str] | Iterable[str | re.Pattern[str]]
"""Names: strings are shell patterns over the whole name (``*.inv_freq``), compiled expressions are searched for."""


def matches(patterns: Patterns) -> Callable[[str], bool]:
    """A predicate that says whether a name matches any of ``patterns``."""
    several = _several(patterns)
    # A name may hold brackets of its own; as itself it always matches.
    literal = {one for one in several if isinstance(one, str)}
    found = [re.compile(fnmatch.translate(one)).match if isinstance(one, str) else one.search for one in several]
    return lambda name: name in literal or any(one(name) for one in found)


def both(one: Patterns, other: Patterns) -> list[str | re.Pattern[str]]:
    """The patterns of either."""
    return [*_several(one), *_several(other)]


def _several(patterns: Patterns) -> list[str | re.Pattern[str]]:
    return [patterns] if isinstance(patterns, (str, re.Pattern)) else list(patterns)
