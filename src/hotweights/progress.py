"""Progress of long work: a bar on a terminal or in a notebook, nothing anywhere else."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class _Stream:
    """Standard error, as it was when this was made. It may be absent, closed, or a terminal that is gone.

    That a bar cannot be drawn is no reason to lose a load.
    """

    def __init__(self) -> None:
        self._stream = sys.stderr
        self.encoding = getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        with suppress(Exception):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(Exception):
            self._stream.flush()

    def isatty(self) -> bool:
        with suppress(Exception):
            return self._stream.isatty()
        return False


@contextmanager
def progress(title: str, nbytes: int, *, show: bool | None = None) -> Iterator[Callable[[int], None]]:
    """A bar of ``nbytes`` bytes with its rate; yields the function to call, from any thread, as bytes arrive.

    Args:
        title: what is being done.
        nbytes: bytes in all.
        show: whether to draw; by default if standard error is a terminal, or in a notebook that has ipywidgets.
    """
    stream = _Stream()
    # rich is not imported for nothing: it takes as long as a small load.
    if show is False or (show is None and not stream.isatty() and "IPython" not in sys.modules):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(file=stream)  # type: ignore[arg-type]  # It has what rich uses.
    if not (_has_widgets() if console.is_jupyter else show or stream.isatty()):
        yield lambda _: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    lock = threading.Lock()
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(title, total=nbytes)

    def advance(count: int) -> None:
        with lock:
            bar.advance(task, count)

    with suppress(Exception):  # A kernel may be gone, as a terminal may.
        bar.start()
    try:
        yield advance
    finally:
        with suppress(Exception):
            bar.stop()


def _has_widgets() -> bool:
    """Whether rich can draw in a notebook; without these it would warn instead."""
    try:
        for name in ("IPython.display", "ipywidgets"):
            importlib.import_module(name)
    except Exception:  # Whatever a broken package raises.
        return False
    return True
