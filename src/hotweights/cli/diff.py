"""``hotweights diff``: which tensors of two checkpoints differ, in how many elements, and by how much."""

from __future__ import annotations

import typer

from ..sources.difference import TensorDifference, differences
from ..sources.opening import open as open_source
from ..text import columns
from . import flags
from .outcome import REFUSED, ending, print_json


def diff(first: flags.Checkpoint, second: flags.Checkpoint, as_json: flags.Json = False) -> None:
    """Compare two checkpoints, tensor by tensor. The exit code is 0 if they are equal, and 1 if they differ."""
    with ending(as_json=as_json), open_source(first) as left, open_source(second) as right:
        found = list(differences(left, right))
        if as_json:
            print_json({"equal": not found, "differences": [each.as_dict() for each in found]})
        elif found:
            typer.echo(columns([("tensor", "differs in", "elements", "largest change"), *map(_row, found)]))
        if found:
            raise typer.Exit(REFUSED)
        if not as_json:
            typer.echo(f"equal: {len(left.manifest)} tensors")


def _row(found: TensorDifference) -> tuple[str, str, str, str]:
    elements = f"{found.elements} of {found.of}" if found.of else ""
    largest = "" if found.largest is None else f"{found.largest:g}"
    return found.name, f"{found.what} {found.detail}".rstrip(), elements, largest
