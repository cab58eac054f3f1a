"""``hotweights send``: a checkpoint to the processes on this host that wait for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..sources.opening import open as open_source
from ..transfer.sender import Sender
from .outcome import ending, print_json


def send(
    path: Annotated[Path, typer.Argument(help="The checkpoint: a file, a directory, an index, a hub cache.")],
    to: Annotated[str, typer.Option(help="Where receivers connect: unix:PATH.")],
    version: Annotated[str | None, typer.Option(help="Its name; by default the checkpoint's path.")] = None,
    receivers: Annotated[int, typer.Option(help="How many must be there before it starts.", min=1)] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds that a single wait may take.")] = 60.0,
    on_lost: Annotated[Literal["abort", "drop"], typer.Option(help="When a receiver is lost.")] = "abort",
    digests: Annotated[bool, typer.Option(help="Whether receivers compare what they copied.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Send a checkpoint to the receivers that connect, all or nobody, and report."""
    with (
        ending(as_json=as_json),
        open_source(path) as source,
        Sender(to, receivers=receivers, timeout=timeout, on_lost=on_lost, digests=digests) as sender,
    ):
        report = sender.send(source, version=str(path) if version is None else version)
        if as_json:
            print_json(report.as_dict())
        else:
            typer.echo(str(report))
