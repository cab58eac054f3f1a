"""How a command ends: with its result or an error, printed for people or as JSON, and its exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from ..errors import HotweightsError, UsageError

REFUSED = 1
WRONG_USAGE = 2
INTERRUPTED = 130


def print_json(content: object) -> None:
    """Print one JSON document on standard output."""
    typer.echo(json.dumps(content, indent=2))


@contextmanager
def ending(*, as_json: bool) -> Iterator[None]:
    """Print our errors, and Ctrl-C, as a message or as JSON, and exit with their code."""
    try:
        yield
    except HotweightsError as error:
        _print_error(error, as_json)
        raise typer.Exit(WRONG_USAGE if isinstance(error, UsageError) else REFUSED) from None
    except KeyboardInterrupt as error:
        _print_error(error, as_json)
        raise typer.Exit(INTERRUPTED) from None


def _print_error(error: BaseException, as_json: bool) -> None:
    notes = list(getattr(error, "__notes__", ()))
    if as_json:
        problems = list(getattr(error, "problems", ()))
        print_json(
            {"error": {"kind": type(error).__name__, "message": str(error), "problems": problems, "notes": notes}}
        )
        return
    console = Console(stderr=True, highlight=False)
    console.print(f"{type(error).__name__}:", style="bold red", end=" ")
    console.print(str(error) or "stopped", markup=False)
    for note in notes:
        console.print(note, markup=False)
