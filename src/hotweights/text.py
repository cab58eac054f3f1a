"""Text for people: sizes, lists of names, tables."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

_END = 20  # characters at either end of a value that is cut
_SHOWN = 3  # names in a line of a report; the report's attributes hold all of them


def some(names: Sequence[str], limit: int = 10) -> str:
    """The first ``limit`` names and how many more there are: ``a, b and 7 more``."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def table(rows: Iterable[tuple[str, str]], width: int = 10) -> str:
    """A line for each label and text; labels are right-aligned in a column of at least ``width`` characters."""
    rows = list(rows)
    width = max(width, *(len(label) for label, _ in rows)) if rows else width
    under = "\n" + " " * (width + 2)
    return "\n".join(f"{label:>{width}}  {text.replace(chr(10), under)}" for label, text in rows)


def size(nbytes: int) -> str:
    """Bytes for people: ``90.9 MB``."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def rate(nbytes: int, seconds: float) -> str:
    """Bytes in some time, for people: ``1.2 GB/s``."""
    return f"{size(round(nbytes / max(seconds, 1e-9)))}/s"


def as_html(text: object) -> str:
    """What it prints, for a notebook."""
    return f"<pre>{html.escape(str(text))}</pre>"


def short(value: object) -> str:
    """The value as Python writes it, cut in its middle if it is long."""
    text = repr(value)
    return text if len(text) <= 2 * _END + 3 else f"{text[:_END]}...{text[-_END:]}"


def counts(numbers: Mapping[str, int]) -> str:
    """Those that are not zero: ``104 written, 2 warnings``. Of one the word is without its s: ``1 warning``."""
    words = {word: word.removesuffix("s") if number == 1 else word for word, number in numbers.items()}
    return ", ".join(f"{number} {words[word]}" for word, number in numbers.items() if number)


def summary(names: tuple[str, ...], casts: Mapping[str, str]) -> str:
    """How many names there are, and a few of them with their casts; many without a cast are only counted."""
    if len(names) > _SHOWN and not any(name in casts for name in names):
        return f"{len(names)} tensors"
    return f"{len(names)}: {some([f'{name} ({casts[name]})' if name in casts else name for name in names], _SHOWN)}"


def columns(rows: Iterable[Sequence[str]]) -> str:
    """Rows under each other, in columns as wide as their texts need: nothing is cut, and nothing is wrapped."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
