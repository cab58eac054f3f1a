"""Background: work in a thread, for a task that awaits it. Who cancels the task stops the work."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from .. import signals

_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


_Awaited = Coroutine[Any, Any, _Result]


def takes_what(
    work: Callable[_Arguments, _Result],
) -> Callable[[Callable[..., _Awaited[_Result]]], Callable[_Arguments, _Awaited[_Result]]]:
    """Mark a coroutine function that hands all its arguments on to ``work``: ``help`` and type checkers show those."""

    def mark(function: Callable[..., _Awaited[_Result]]) -> Callable[_Arguments, _Awaited[_Result]]:
        function.__signature__ = inspect.signature(work)  # type: ignore[attr-defined]
        return function

    return mark


async def in_background(work: Callable[[], _Result]) -> _Result:
    """Do the work in a thread of the loop's executor, with this task's context, while other tasks run.

    Cancelled, it asks the work to stop, and waits until that has ended. A second cancellation does not wait.
    """
    stop, context = signals.Stop(), contextvars.copy_context()
    # No task: at its end, asyncio.run cancels all of these at once, and nobody would wait for the thread.
    running = asyncio.get_running_loop().run_in_executor(None, context.run, stop.run, work)
    running.add_done_callback(_look)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.asked = True
        if not stop.begun:  # It waits for a thread of the executor, which may take long.
            running.cancel()
        else:
            await asyncio.wait((running,))
        raise


def _look(running: asyncio.Future[_Result]) -> None:
    """Where nobody waits any more, asyncio would complain of an exception that nobody looked at."""
    if not running.cancelled():
        running.exception()
