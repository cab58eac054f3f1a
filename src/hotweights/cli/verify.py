"""``hotweights verify``: read every byte of checkpoints, say their digests, and compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from . import flags
from .deadline import Deadline, deadline_of
from .outcome import ending, print_json, shown
from .output import is_digests, may_write
from .several import for_each, paths_from


def verify(
    paths: flags.Checkpoints = None,
    digests: Annotated[
        Path | None, typer.Option(help="What it must hold: lines of sha256sum, or a file that --write made.")
    ] = None,
    write: Annotated[Path | None, typer.Option(help="Write the digest of every tensor of one path to a file.")] = None,
    files_from: flags.FilesFrom = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only what is wrong.")] = False,
    reader: flags.Reader = "hotweights",
    variant: flags.Variant = None,
    subfolder: flags.Subfolder = None,
    deadline: Deadline = None,
    as_json: flags.JsonOfSeveral = False,
) -> None:
    """Read every byte of checkpoints, compare them with their digests, and print the digest of all tensors of each."""

    def read(path: str) -> tuple[str, dict[str, object]] | None:
        from ..sources.checksums import write_digests  # They wait for torch, which wrong usage need not.
        from ..sources.opening import open as open_source

        with open_source(
            path, reader=reader, variant=variant, subfolder=subfolder, digests=digests, deadline=seconds(path)
        ) as source:
            digest = source.digest()
        if write is not None:
            write_digests(digest, write)
        return None if quiet else (f"{digest.whole}  {shown(path)}", digest.as_dict())

    about = None if files_from is None else {"path": str(files_from)}
    with ending(as_json=as_json, json_lines=files_from is not None, about=about):
        may_write("--write", write, is_digests)
        everything = paths_from(paths, files_from, "verify")
        seconds = deadline_of(deadline, everything)
        if write is not None and len(everything) > 1:
            raise UsageError(f"--write is for one path, and there are {len(everything)}; write a file for each")
        if len(everything) != 1 or files_from is not None:
            raise typer.Exit(for_each(everything, read, as_json=as_json))
    (path,) = everything
    with ending(as_json=as_json, about={"path": path}):
        if (found := read(path)) is not None:
            words, facts = found
            if as_json:
                print_json({"path": path, **facts})
            else:
                typer.echo(words)
