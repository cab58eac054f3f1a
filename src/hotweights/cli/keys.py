"""``hotweights keys``: make the keys by which the hosts of one job know each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .outcome import ending, shown


def keys(
    directory: Annotated[Path, typer.Argument(help="Where they shall lie; it is made if it is not there.")],
    hosts: Annotated[str, typer.Option(help="Names or addresses of hosts, as in tcps://HOST:PORT, with commas.")],
    days: Annotated[int, typer.Option(help="How long they are valid.", min=1)] = 825,
) -> None:
    """Make a key and a certificate for each host of a job. Run again for hosts that join it later."""
    with ending(as_json=False):
        from ..transfer.keys import make_keys

        try:
            made = make_keys(directory, [host for host in hosts.split(",") if host], days=days)
        except OSError as error:
            raise UsageError(f"{error.filename or directory}: cannot be written: {error.strerror}") from error
        for path in made:
            typer.echo(shown(path))
