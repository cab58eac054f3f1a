"""``hotweights load``: a checkpoint into a transformers model, to see that it fits, how fast, in how much memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from ..dtypes import FORMAT_DTYPES
from ..engines import transformers
from ..errors import UnknownName
from ..loading.load import load as load_weights
from ..sources.opening import open as open_source
from ..sources.readers.source import READERS
from .outcome import ending, print_json


def load(
    path: Annotated[Path, typer.Argument(help="The checkpoint: a file, a directory, an index, a hub cache.")],
    model: Annotated[Path, typer.Option(help="A directory with the config.json of a transformers model.")],
    reader: Annotated[str, typer.Option(help=f"Who reads the files: hotweights, {', '.join(READERS)}.")] = "hotweights",
    device: Annotated[str, typer.Option(help="Where the parameters are made real.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Of the parameters (BF16, F32, ...); else the config's.")] = None,
    cast: Annotated[Literal["error", "loader"], typer.Option(help="What a cast that loses information is.")] = "error",
    io: Annotated[
        Literal["auto", "buffered", "direct"], typer.Option(help="Through the page cache, or around it.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(help="How many read at once.", min=1)] = None,
    allow_missing: Annotated[list[str] | None, typer.Option(help="Names that may be missing, * is any.")] = None,
    allow_unexpected: Annotated[list[str] | None, typer.Option(help="Names that may have no place.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Build a model from its config, load a checkpoint into it, and report. The model is thrown away."""
    with ending(as_json=as_json), open_source(path, reader=reader) as source:
        built = transformers.build(model, dtype=None if dtype is None else _dtype(dtype))
        report = load_weights(
            built,
            source,
            device=device,
            allow_missing=allow_missing or (),
            allow_unexpected=allow_unexpected or (),
            cast=cast,
            io=io,
            threads=threads,
        )
        if as_json:
            print_json(report.as_dict())
        else:
            typer.echo(f"{type(built).__name__} from {path}")
            typer.echo(str(report))


def _dtype(name: str) -> torch.dtype:
    known = {format_name: torch_name for format_name, (_, torch_name) in FORMAT_DTYPES.items() if torch_name}
    found = getattr(torch, known.get(name.upper(), name), None)
    if not isinstance(found, torch.dtype):
        raise UnknownName("dtype", name, known)
    return found
