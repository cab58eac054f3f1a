"""Text for people: sizes, lists of names, tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

_SHOWN = 3  # names a line; the report holds all of them


def some(names: Sequence[str], limit: int = 10) -> str:
    """The first ``limit`` names and how many more there are: ``a, b and 7 more``."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def table(rows: Iterable[tuple[str, str]], width: int = 10) -> str:
    """Lines of a label, right-aligned in a column at least ``width`` wide, and a text."""
    rows = list(rows)
    width = max(width, *(len(label) for label, _ in rows)) if rows else width
    return "\n".join(f"{label:>{width}}  {text}" for label, text in rows)


def size(nbytes: int) -> str:
    """Bytes for people: ``90.9 MB``."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def summary(names: tuple[str, ...], casts: Mapping[str, str]) -> str:
    """A few names, with their casts; or how many there are."""
    if len(names) > _SHOWN and not any(name in casts for name in names):
        return f"{len(names)} tensors"
    shown = [f"{name} ({casts[name]})" if name in casts else name for name in names[:_SHOWN]]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)}: {', '.join(shown)}{more}"
