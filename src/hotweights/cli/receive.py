"""``hotweights receive``: versions that a sender on this host sends, into a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..engines import transformers
from ..live.model import LiveModel
from ..transfer.receiver import Receiver
from .outcome import ending, print_json

_TOLD = ("version", "previous", "bytes_read", "bytes_written", "seconds", "stall_seconds", "warnings")


def receive(
    sender: Annotated[str, typer.Option("--from", help="Where the sender listens: unix:PATH.")],
    model: Annotated[Path, typer.Option(help="A directory with the config.json of a transformers model.")],
    versions: Annotated[int, typer.Option(help="How many to take before it ends.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="Where the parameters are made real.")] = "cpu",
    timeout: Annotated[float, typer.Option(help="Seconds that a single wait within an update may take.")] = 60.0,
    offer_timeout: Annotated[float, typer.Option(help="Seconds to wait for the next version.")] = 3600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document for each version.")] = False,
) -> None:
    """Build a model from its config and take versions into it, in place, all or nothing. The model is thrown away."""
    with ending(as_json=as_json), Receiver(sender, timeout=timeout, offer_timeout=offer_timeout) as source:
        built = transformers.build(model)
        live = LiveModel(built)
        for number in range(versions):
            report = live.update(source) if number else live.load(source, device=device)
            if as_json:
                print_json({name: getattr(report, name) for name in _TOLD})
            else:
                typer.echo(f"{type(built).__name__} from {sender}")
                typer.echo(str(report))
