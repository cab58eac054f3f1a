"""``hotweights diff``: which tensors of two checkpoints differ, in how many elements, and by how much."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

import typer

from ..sources.dcp.source import DcpSource
from ..sources.difference import TensorDifference, differences
from ..sources.files.source import FileSource
from ..sources.opening import open as open_source
from ..text import columns
from . import flags
from .outcome import REFUSED, ending, print_json


def diff(
    first: flags.Checkpoint,
    second: flags.Checkpoint,
    variant: flags.Variant = None,
    subfolder: flags.Subfolder = None,
    as_json: flags.Json = False,
) -> None:
    """Compare two checkpoints, tensor by tensor. The exit code is 0 if they are equal, and 1 if they differ.

    A variant and a subfolder are those of both where both are directories, or else of the one that is.
    """
    with ending(as_json=as_json), ExitStack() as stack:
        left, right = _opened((first, second), variant, subfolder, stack)
        found = list(differences(left, right))
        if as_json:
            print_json({"equal": not found, "differences": [each.as_dict() for each in found]})
        elif found:
            typer.echo(columns([("tensor", "differs in", "elements", "largest change"), *map(_row, found)]))
        if found:
            raise typer.Exit(REFUSED)
        if not as_json:
            typer.echo(f"equal: {len(left.manifest)} tensors")


def _opened(
    paths: Sequence[str], variant: str | None, subfolder: str | None, stack: ExitStack
) -> list[FileSource | DcpSource]:
    """A single file, such as a copy of the variant, has no others to choose from."""
    chosen = [path for path in paths if os.path.isdir(path)] or paths
    found: list[FileSource | DcpSource] = []
    for path in paths:
        choice = (variant, subfolder) if path in chosen else (None, None)
        found.append(open_source(path, variant=choice[0], subfolder=choice[1]))
        stack.push(found[-1])
    return found


def _row(found: TensorDifference) -> tuple[str, str, str, str]:
    elements = f"{found.elements} of {found.of}" if found.of else ""
    largest = "" if found.largest is None else f"{found.largest:g}"
    return found.name, f"{found.what} {found.detail}".rstrip(), elements, largest
