"""``hotweights receive``: take the versions that a sender sends into a transformers model."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
import typer

from . import flags
from .noise import hide_noise
from .outcome import ending, print_json


def receive(
    sender: Annotated[
        str, typer.Option("--from", help="Where the sender listens: unix:PATH, tcps://HOST:PORT, ray:NAME or env:.")
    ],
    model: flags.Model,
    versions: Annotated[int, typer.Option(help="How many versions to take.", min=1)] = 1,
    device: flags.Device = "cpu",
    allow_missing: flags.AllowMissing = None,
    allow_unexpected: flags.AllowUnexpected = None,
    allow_mismatched: flags.AllowMismatched = None,
    cast: flags.Casts = None,
    timeout: Annotated[float, typer.Option(help="Seconds that a single wait within an update may take.")] = 60.0,
    offer_timeout: Annotated[float, typer.Option(help="Seconds to wait for the next version.")] = 3600.0,
    keys: flags.Keys = None,
    insecure: flags.Insecure = False,
    relay: Annotated[
        bool, typer.Option("--relay", help="Share the network with all on this host that say so, through one relay.")
    ] = False,
    keep: Annotated[
        str | None,
        typer.Option(help="With --relay: memory in which that keeps the last version for workers that come later."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document for each version.")] = False,
) -> None:
    """Build a model from its config and take versions into it, in place, all or nothing. The model is thrown away."""
    with ending(as_json=as_json):
        hide_noise()
        from ..engines import transformers  # They wait for torch, which wrong usage need not.
        from ..live.model import LiveModel
        from ..transfer.receiver import Receiver

        with Receiver(
            sender, timeout=timeout, offer_timeout=offer_timeout, keys=keys, insecure=insecure, relay=relay, keep=keep
        ) as source:
            built = transformers.build(model)
            live = LiveModel(built)
            for number in range(versions):
                if _on_terminal():
                    said = (
                        f"waiting for version {number + 1} of {versions} from {sender}, for {offer_timeout:g} s at most"
                    )
                    typer.echo(said, err=True)
                if number:
                    report = live.update(source, cast=cast)
                else:
                    report = live.load(
                        source,
                        device=device,
                        allow_missing=allow_missing or (),
                        allow_unexpected=allow_unexpected or (),
                        allow_mismatched=allow_mismatched or (),
                        cast=cast,
                    )
                if as_json:
                    facts = msgspec.to_builtins(report)
                    del facts["events"]  # One for each layer: they are for a trace viewer.
                    print_json(facts)
                else:
                    typer.echo(f"{type(built).__name__} from {sender}")
                    typer.echo(str(report))


def _on_terminal() -> bool:
    return sys.stderr.isatty()
