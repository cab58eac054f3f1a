"""``hotweights relay``: hand on to this host's workers what a sender on another host sends, each byte once."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from . import flags
from .outcome import ending


def relay(
    sender: Annotated[
        str,
        typer.Option("--from", help="Where the sender, or another relay, listens: tcps://HOST:PORT, ray:NAME or env:."),
    ],
    to: Annotated[
        list[str], typer.Option(help="Where workers connect: unix:PATH. Several times: for other relays too.")
    ],
    keys: flags.Keys = None,
    insecure: flags.Insecure = False,
    name: Annotated[str, typer.Option(help="For people: it stands in the sender's errors.")] = "relay",
    timeout: Annotated[float, typer.Option(help="Seconds that a single wait for the sender may take.")] = 60.0,
    keep: Annotated[
        str | None,
        typer.Option(help="Memory in which the last version is kept for workers that come later, such as 40GB."),
    ] = None,
) -> None:
    """Run a relay, one for each host, until it is interrupted. Senders and workers may come and go."""
    logging.basicConfig(format="%(message)s")
    if keep is not None:
        logging.getLogger("hotweights").setLevel(logging.INFO)  # What is kept, and in how much memory.
    with ending(as_json=False):
        from ..transfer.relay import Relay  # It waits for torch, which wrong usage need not.

        with Relay(sender, to, keys=keys, insecure=insecure, name=name, timeout=timeout, keep=keep) as running:
            typer.echo(f"relay from {sender} to {', '.join(to)}; Ctrl-C ends it", err=True)
            running.run()
