"""Progress of long work: a bar on a terminal, nothing anywhere else."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(title: str, nbytes: int, *, show: bool | None = None) -> Iterator[Callable[[int], None]]:
    """A bar of ``nbytes`` bytes with its rate; yields the function to call, from any thread, as bytes arrive.

    Args:
        title: what is being done.
        nbytes: bytes in all.
        show: whether to draw; by default if standard error is a terminal.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    lock = threading.Lock()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=nbytes)

        def advance(count: int) -> None:
            with lock:
                bar.advance(task, count)

        yield advance
