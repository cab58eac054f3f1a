"""``hotweights verify``: read every byte of a checkpoint, say its digest, and compare it with what it should be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..sources.checksums import write_digests
from ..sources.opening import open as open_source
from . import flags
from .outcome import ending, print_json


def verify(
    path: flags.Checkpoint,
    digests: Annotated[
        Path | None, typer.Option(help="What it must hold: lines of sha256sum, or a file that --write made.")
    ] = None,
    write: Annotated[Path | None, typer.Option(help="Write the digest of every tensor to a file.")] = None,
    variant: flags.Variant = None,
    subfolder: flags.Subfolder = None,
    as_json: flags.Json = False,
) -> None:
    """Read every byte of a checkpoint, compare it with its digests, and print the digest of all tensors."""
    with (
        ending(as_json=as_json),
        open_source(path, variant=variant, subfolder=subfolder, digests=digests) as source,
    ):
        digest = source.digest()
        if write is not None:
            write_digests(digest, write)
        if as_json:
            print_json({"path": str(path), **digest.as_dict()})
        else:
            typer.echo(f"{digest.whole}  {path}")
