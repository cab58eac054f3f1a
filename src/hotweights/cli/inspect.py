"""``hotweights inspect``: what checkpoints hold. It reads headers, no weights, and does not wait for torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from ..dtypes import format_name
from ..sources.dcp.place import dcp_place
from ..sources.files.listing import Listed, Listing, list_checkpoint
from ..text import columns, counts, size
from . import flags
from .deadline import Deadline, deadline_of
from .outcome import ending, print_json, shown
from .several import for_each, paths_from


def inspect(
    paths: flags.Checkpoints = None,
    files_from: flags.FilesFrom = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only what is wrong.")] = False,
    as_json: flags.JsonOfSeveral = False,
    limit: flags.Limit = 40,
    reader: flags.Reader = "hotweights",
    variant: flags.Variant = None,
    subfolder: flags.Subfolder = None,
    deadline: Deadline = None,
) -> None:
    """List the tensors of a checkpoint and check its files; of several, say a line for each. No weight is read."""
    about = None if files_from is None else {"path": str(files_from)}
    with ending(as_json=as_json, json_lines=files_from is not None, about=about):
        everything = paths_from(paths, files_from, "inspect")
        which = Which(reader, variant, subfolder, deadline_of(deadline, everything))
    if quiet or len(everything) != 1 or files_from is not None:
        with ending(as_json=as_json):
            raise typer.Exit(for_each(everything, lambda path: _of_several(path, which, quiet), as_json=as_json))
    (path,) = everything
    with ending(as_json=as_json, about={"path": path}):
        listing = _list(path, which)
        if as_json:
            print_json({"path": path, **_as_dict(listing)})
        else:
            _print(listing, limit)


def _of_several(path: str, which: Which, quiet: bool) -> tuple[str, dict[str, object]] | None:
    listing = _list(path, which)
    if quiet and not listing.warnings:
        return None
    return f"{shown(path)}: {_in_words(listing)}", _totals(listing)


class Which(NamedTuple):
    """What is listed of a path, and by which reader."""

    reader: str
    variant: str | None
    subfolder: str | None
    deadline: Callable[[str], float | None]


def _list(path: str, which: Which) -> Listing:
    reader, variant, subfolder, deadline = which
    # Neither an address nor a hub's name: what is not there is said without torch, too.
    local = os.path.exists(path) or (":" not in path and os.path.isdir(os.path.dirname(path) or "."))
    if reader == "hotweights" and local and dcp_place(path, subfolder) is None:
        return list_checkpoint(path, variant=variant, subfolder=subfolder)
    from ..sources.opening import open as open_source  # Waits for torch, and says what a path that is none may be.

    with open_source(path, reader=reader, variant=variant, subfolder=subfolder, deadline=deadline(path)) as source:
        tensors = tuple(Listed(spec, source.file_of(spec.name), None) for spec in source.manifest.values())
        return Listing(source.files, source.metadata, source.warnings, tensors)


def _totals(listing: Listing) -> dict[str, object]:
    return {
        "files": list(listing.files),
        "warnings": list(listing.warnings),
        "nbytes": listing.nbytes,
        "dtypes": dict(Counter(format_name(tensor.spec.dtype) for tensor in listing.tensors)),
    }


def _in_words(listing: Listing) -> str:
    dtypes = Counter(format_name(tensor.spec.dtype) for tensor in listing.tensors)
    kinds = ", ".join(f"{count} {name}" for name, count in dtypes.most_common())
    files = [file for file in listing.files if not file.endswith(".json")]  # An index holds none of these bytes.
    held = counts({"tensors": len(listing.tensors)}) or "no tensors"
    words = f"{held} ({kinds}), {size(listing.nbytes)} in {counts({'files': len(files)})}" if files else held
    return "; ".join([words, *(f"warning: {warning}" for warning in listing.warnings)])


def _as_dict(listing: Listing) -> dict[str, object]:
    return {
        "files": list(listing.files),
        "metadata": listing.metadata,
        "warnings": list(listing.warnings),
        "nbytes": listing.nbytes,
        "tensors": [
            {
                "name": spec.name,
                "dtype": format_name(spec.dtype),
                "shape": list(spec.shape),
                "nbytes": spec.nbytes,
                "file": file,
                # For other readers a tensor need not be a range of its file.
                **({} if offset is None else {"offset": offset}),
            }
            for spec, file, offset in ((tensor.spec, tensor.file, tensor.offset) for tensor in listing.tensors)
        ],
    }


def _print(listing: Listing, limit: int) -> None:
    rows = [
        (
            shown(spec.name),
            format_name(spec.dtype),
            str(list(spec.shape)),
            size(spec.nbytes),
            shown(Path(tensor.file).name),
        )
        for tensor in listing.tensors[: limit or None]
        for spec in (tensor.spec,)
    ]
    typer.echo(columns([("tensor", "dtype", "shape", "bytes", "file"), *rows]))
    hidden = len(listing.tensors) - limit
    if limit and hidden > 0:
        typer.echo(f"... and {hidden} more; --limit 0 lists all")
    for warning in listing.warnings:
        typer.echo(f"warning: {warning}")
    typer.echo(_in_words(Listing(listing.files, {}, (), listing.tensors)))
