"""Several paths in one start: a line for each, or a JSON document in each line, and the worst exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import typer

from ..errors import HotweightsError, UsageError
from .outcome import as_dict, exit_code, shown, typed


def paths_from(paths: Iterable[str] | None, files_from: Path | None, command: str) -> list[str]:
    """All paths that were named; none only if ``files_from`` names none: a hook that found no file has nothing to do.

    Raises:
        UsageError: none was named, or ``files_from`` cannot be read.
    """
    named = [*(paths or []), *_named_in(files_from)]
    if not named and files_from is None:
        raise UsageError(f"name a path: hotweights {command} PATH, or --files-from FILE")
    if not named:
        typer.echo(f"warning: no paths in {'standard input' if str(files_from) == '-' else files_from}", err=True)
    return named


def _named_in(files_from: Path | None) -> list[str]:
    if files_from is None:
        return []
    try:
        raw = sys.stdin.buffer.read() if str(files_from) == "-" else files_from.read_bytes()
        # No line end but these: a name may hold others that Unicode has. Bytes that are no text are part of a name.
        text = raw.decode(sys.getfilesystemencoding(), "surrogateescape")
    except OSError as error:
        raise UsageError(f"{files_from}: cannot be read: {error.strerror}") from error
    if "\0" in text:
        return [name for name in text.split("\0") if name]
    return [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]


def for_each(
    paths: Iterable[str], read: Callable[[str], tuple[str, Mapping[str, object]] | None], *, as_json: bool
) -> int:
    """Print what ``read`` says of each path, for people or for JSON; ``None`` is nothing. Returns the worst code."""
    worst = 0
    for path in paths:
        try:
            found = read(path)
        except HotweightsError as error:
            worst = max(worst, exit_code(error))
            found = f"{shown(path)}: {type(error).__name__}: {_line(error)}", as_dict(error)
        if found is not None:
            words, facts = found
            typer.echo(json.dumps({"path": path, **facts}) if as_json else words)
    return worst


def _line(error: HotweightsError) -> str:
    return shown(typed("; ".join(line.strip() for line in str(error).splitlines())))
