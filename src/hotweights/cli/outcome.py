"""How a command ends: with its result or an error, printed for people or as JSON, and its exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import typer

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
        raise typer.Exit(exit_code(error)) from None
    except KeyboardInterrupt as error:
        _print_error(error, as_json)
        raise typer.Exit(INTERRUPTED) from None


def exit_code(error: HotweightsError) -> int:
    """The exit code of a command that ends with this error."""
    return WRONG_USAGE if isinstance(error, UsageError) else REFUSED


def as_dict(error: BaseException) -> dict[str, object]:
    """The error, for JSON."""
    return {
        "error": {
            "kind": type(error).__name__,
            "message": str(error),
            "problems": list(getattr(error, "problems", ())),
            "notes": list(getattr(error, "__notes__", ())),
        }
    }


def _print_error(error: BaseException, as_json: bool) -> None:
    if as_json:
        print_json(as_dict(error))
        return
    typer.secho(f"{type(error).__name__}:", fg="red", bold=True, err=True, nl=False)
    typer.echo(f" {error}" if str(error) else " stopped", err=True)  # Not wrapped: whoever searches it finds names.
    for note in getattr(error, "__notes__", ()):
        typer.echo(note, err=True)
