"""``hotweights diff``: which tensors of two checkpoints differ, in how many elements, and by how much."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import typer

from ..text import columns, counts
from . import flags
from .deadline import Deadline, deadline_of
from .outcome import ending, print_json, shown

if TYPE_CHECKING:
    from ..sources.dcp.source import DcpSource
    from ..sources.difference import TensorDifference
    from ..sources.files.source import FileSource

DIFFERENT = 1
TROUBLE = 2  # as of diff(1): whoever asks whether two differ must not take a lost file for an answer


def diff(
    first: flags.Checkpoint,
    second: flags.Checkpoint,
    variant: flags.Variant = None,
    subfolder: flags.Subfolder = None,
    deadline: Deadline = None,
    as_json: flags.Json = False,
) -> None:
    """Compare two checkpoints, tensor by tensor. The exit code is 0 if they are equal, 1 if they differ, 2 for trouble.

    A variant and a subfolder are those of both where both are directories, or else of the one that is.
    """
    about = {"first": first, "second": second}
    with ending(as_json=as_json, code=TROUBLE, about=about), ExitStack() as stack:
        from ..sources.difference import differences  # It waits for torch, which wrong usage need not.

        left, right = _opened((first, second), variant, subfolder, deadline, stack)
        found = list(differences(left, right))
        if as_json:
            print_json({**about, "equal": not found, "differences": [each.as_dict() for each in found]})
        elif found:
            typer.echo(columns([("tensor", "differs in", "elements", "largest change"), *map(_row, found)]))
        if found:
            raise typer.Exit(DIFFERENT)
        if not as_json:
            typer.echo(f"equal: {counts({'tensors': len(left.manifest)}) or 'no tensors'}")


def _opened(
    paths: Sequence[str], variant: str | None, subfolder: str | None, deadline: float | None, stack: ExitStack
) -> list[FileSource | DcpSource]:
    """A single file, such as a copy of the variant, has no others to choose from."""
    from ..sources.opening import open as open_source

    seconds = deadline_of(deadline, paths)
    chosen = [path for path in paths if os.path.isdir(path)] or paths
    found: list[FileSource | DcpSource] = []
    for path in paths:
        choice = (variant, subfolder) if path in chosen else (None, None)
        found.append(open_source(path, variant=choice[0], subfolder=choice[1], deadline=seconds(path)))
        stack.push(found[-1])
    return found


def _row(found: TensorDifference) -> tuple[str, str, str, str]:
    elements = f"{found.elements} of {found.of}" if found.of else ""
    largest = "" if found.largest is None else f"{found.largest:g}"
    return shown(found.name), f"{found.what} {found.detail}".rstrip(), elements, largest
