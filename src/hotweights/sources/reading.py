"""How a source is read: what the callers of loads and updates may say about it is checked here."""

from __future__ import annotations

from ..arguments import check_choices, check_count, check_flags, check_kind
from ..memory.pool import Pool
from .contracts import IOMode


def check_reading(io: IOMode, threads: int | None, pool: Pool | None, show_progress: bool | None) -> None:
    """Raise ``UsageError`` for an option of the wrong kind."""
    check_choices(io=(io, IOMode))
    check_kind("pool", pool, Pool, "a Pool")
    check_flags(show_progress=show_progress)
    if threads is not None:
        check_count(1, threads=threads)
