"""``hotweights inspect``: what a checkpoint holds. It reads headers, no weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..dtypes import format_name
from ..sources.files.source import FileSource
from ..sources.opening import open as open_source
from ..sources.readers.source import ReaderSource
from ..text import size
from . import flags
from .outcome import ending, print_json


def inspect(
    path: flags.Checkpoint,
    as_json: flags.Json = False,
    limit: flags.Limit = 40,
    reader: flags.Reader = "hotweights",
    variant: flags.Variant = None,
    subfolder: flags.Subfolder = None,
) -> None:
    """List the tensors of a checkpoint and check its files. No weight is read."""
    with (
        ending(as_json=as_json),
        open_source(path, reader=reader, variant=variant, subfolder=subfolder) as source,
    ):
        if as_json:
            print_json(_as_dict(source))
        else:
            _print(source, limit)


def _as_dict(source: FileSource | ReaderSource) -> dict[str, object]:
    tensors: list[dict[str, object]] = [
        {
            "name": spec.name,
            "dtype": format_name(spec.dtype),
            "shape": list(spec.shape),
            "nbytes": spec.nbytes,
            "file": source.file_of(spec.name),
        }
        for spec in source.manifest.values()
    ]
    if isinstance(source, FileSource):  # For other readers a tensor need not be a range of its file.
        for tensor in tensors:
            tensor["offset"] = source.position(str(tensor["name"]))[1]
    return {
        "files": list(source.files),
        "metadata": source.metadata,
        "warnings": list(source.warnings),
        "nbytes": source.manifest.nbytes,
        "tensors": tensors,
    }


def _print(source: FileSource | ReaderSource, limit: int) -> None:
    console = Console()
    table = Table("tensor", "dtype", "shape", "bytes", "file", box=None, header_style="bold")
    for spec in list(source.manifest.values())[: limit or None]:
        file = Path(source.file_of(spec.name)).name
        table.add_row(spec.name, format_name(spec.dtype), str(list(spec.shape)), size(spec.nbytes), file)
    console.print(table)
    hidden = len(source.manifest) - limit
    if limit and hidden > 0:
        console.print(f"... and {hidden} more; --limit 0 lists all")
    dtypes = Counter(format_name(spec.dtype) for spec in source.manifest.values())
    kinds = ", ".join(f"{count} {name}" for name, count in dtypes.most_common())
    for warning in source.warnings:
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{len(source.manifest)} tensors ({kinds}), {size(source.manifest.nbytes)} in {len(source.files)} files"
    )
