"""``hotweights send``: send a checkpoint to processes that receive it, on this host or others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from . import flags
from .deadline import Deadline, deadline_of
from .outcome import ending, print_json
from .output import is_timeline, may_write


def send(
    path: flags.Checkpoint,
    to: Annotated[str, typer.Option(help="Where receivers connect: unix:PATH, tcps://HOST:PORT, ray:NAME or env:.")],
    version: Annotated[str | None, typer.Option(help="The version's name; else the path.")] = None,
    receivers: Annotated[int, typer.Option(help="How many receivers to wait for.", min=1)] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds that a single wait may take.")] = 60.0,
    on_lost: Annotated[
        Literal["abort", "drop"], typer.Option(help="If a receiver is lost: abort for all, or go on without it.")
    ] = "abort",
    digests: Annotated[bool, typer.Option(help="Compare digests of what was sent and what was copied.")] = True,
    carrier: Annotated[
        Literal["sockets", "pg", "nixl"], typer.Option(help="How the bytes get to other hosts: docs/hosts.md.")
    ] = "sockets",
    encrypt: Annotated[
        Literal["control", "all"], typer.Option(help="Between hosts with keys: all but the weights, or those too.")
    ] = "control",
    keys: flags.Keys = None,
    insecure: flags.Insecure = False,
    deadline: Deadline = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write what the time was spent on, with a track for each host, for a trace viewer."),
    ] = None,
    as_json: flags.Json = False,
) -> None:
    """Send a checkpoint to the receivers that connect: all of them take it, or none. Report what was sent."""
    with ending(as_json=as_json, about={"path": path}):
        from ..sources.opening import open as open_source  # They wait for torch, which wrong usage need not.
        from ..transfer.sender import Sender

        may_write("--trace", trace, is_timeline)
        with (
            open_source(path, deadline=deadline_of(deadline, [path])(path)) as source,
            Sender(
                to,
                receivers=receivers,
                timeout=timeout,
                on_lost=on_lost,
                digests=digests,
                carrier=carrier,
                encrypt=encrypt,
                keys=keys,
                insecure=insecure,
            ) as sender,
        ):
            if sender.address != to:  # Nobody else knows a port that was free, or what the environment says.
                typer.echo(f"listening at {sender.address}", err=True)
            report = sender.send(source, version=str(path) if version is None else version)
            if trace is not None:
                report.save_timeline(trace)
            if as_json:
                print_json({"path": path, **report.as_dict()})
            else:
                typer.echo(str(report))
