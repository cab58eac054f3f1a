"""``hotweights inspect``: what checkpoints hold. It reads headers, no weights, and does not wait for torch."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from ..dtypes import format_name
from ..errors import CheckpointError, HotweightsError, UsageError
from ..sources.dcp.place import dcp_place
from ..sources.files.listing import Listed, Listing, list_checkpoint
from ..text import columns, size
from . import flags
from .outcome import as_dict, ending, exit_code, print_json


def inspect(
    paths: Annotated[
        list[str] | None,
        typer.Argument(help="Safetensors files, checkpoint directories, indexes, hub caches.", metavar="PATH..."),
    ] = None,
    files_from: Annotated[
        Path | None, typer.Option(help="A file that names one path a line; - is standard input.", allow_dash=True)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only what is wrong.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document; for several paths, one in each line.")
    ] = False,
    limit: flags.Limit = 40,
    reader: flags.Reader = "hotweights",
    variant: flags.Variant = None,
    subfolder: flags.Subfolder = None,
) -> None:
    """List the tensors of a checkpoint and check its files; of several, say a line for each. No weight is read."""
    with ending(as_json=as_json):
        everything = [*(paths or []), *_named_in(files_from)]
        if not everything:
            if files_from is not None:
                return  # A hook that found no file has nothing to check.
            raise UsageError("name a path: hotweights inspect PATH, or --files-from FILE")
        if len(everything) > 1 or files_from is not None:
            raise typer.Exit(_inspect_each(everything, Which(reader, variant, subfolder), quiet, as_json))
        listing = _list(everything[0], Which(reader, variant, subfolder))
        if as_json and not quiet:
            print_json(_as_dict(listing))
        elif not quiet:
            _print(listing, limit)


def _named_in(files_from: Path | None) -> list[str]:
    if files_from is None:
        return []
    try:
        text = sys.stdin.read() if str(files_from) == "-" else files_from.read_text()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{files_from}: cannot be read: {getattr(error, 'strerror', error)}") from error
    return [line for line in text.splitlines() if line.strip()]


def _inspect_each(paths: Iterable[str], which: Which, quiet: bool, as_json: bool) -> int:
    """A line for each path. Returns the worst exit code."""
    worst = 0
    for path in paths:
        try:
            listing = _list(path, which)
        except HotweightsError as error:
            worst = max(worst, exit_code(error))
            line = (
                {"path": str(path), **as_dict(error)} if as_json else f"{path}: {type(error).__name__}: {_line(error)}"
            )
        else:
            if quiet and not listing.warnings:
                continue
            line = {"path": str(path), **_totals(listing)} if as_json else f"{path}: {_in_words(listing)}"
        typer.echo(json.dumps(line) if as_json else line)
    return worst


class Which(NamedTuple):
    """What is listed of a path, and by which reader."""

    reader: str
    variant: str | None
    subfolder: str | None


def _list(path: str, which: Which) -> Listing:
    reader, variant, subfolder = which
    if reader == "hotweights" and os.path.exists(path) and dcp_place(path, subfolder) is None:
        return list_checkpoint(path, variant=variant, subfolder=subfolder)
    from ..sources.opening import open as open_source  # Waits for torch, and says what a path that is none may be.

    with open_source(path, reader=reader, variant=variant, subfolder=subfolder) as source:
        tensors = tuple(Listed(spec, source.file_of(spec.name), None) for spec in source.manifest.values())
        return Listing(source.files, source.metadata, source.warnings, tensors)


def _line(error: HotweightsError) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines())


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
    words = f"{len(listing.tensors)} tensors ({kinds}), {size(listing.nbytes)} in {len(listing.files)} files"
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
        (spec.name, format_name(spec.dtype), str(list(spec.shape)), size(spec.nbytes), Path(tensor.file).name)
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
