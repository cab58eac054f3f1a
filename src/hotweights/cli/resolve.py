"""``hotweights resolve``: end the doubts of workers whose sender does not come back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import TransferInDoubt, UsageError
from ..text import some
from . import flags
from .outcome import ending, print_json

if TYPE_CHECKING:
    from ..transfer.resolve import Resolution, Word


def resolve(
    addresses: Annotated[
        list[str], typer.Argument(help="Where the sender listened: tcps://HOST:PORT, ray:NAME or env:. All of them.")
    ],
    keys: flags.Keys = None,
    insecure: flags.Insecure = False,
    wait: Annotated[float, typer.Option(help="Seconds in which members may come.", min=0.1)] = 10.0,
    commit: Annotated[bool, typer.Option("--commit", help="Where it does not follow: they take the version.")] = False,
    abort: Annotated[bool, typer.Option("--abort", help="Where it does not follow: nobody takes it.")] = False,
    as_json: flags.Json = False,
) -> None:
    """Hear the members of a sender that is gone, and tell those in doubt what follows from what all of them say.

    If one has taken the version, all do; if all have come and none has, nobody does. Otherwise it shows who is waited
    for, and the exit code is 1. A sender that comes back does the same before it sends.
    """
    with ending(as_json=as_json):
        if commit and abort:
            raise UsageError("--commit and --abort: one of them")
        from ..transfer.resolve import Resolver  # It waits for torch, which wrong usage need not.

        word: Word | None = "commit" if commit else "abort" if abort else None
        with Resolver(addresses, keys=keys, insecure=insecure) as resolver:
            found = resolver.run(wait, decision=word)
        if as_json:
            print_json([_as_dict(resolution) for resolution in found])
        else:
            for resolution in found:
                typer.echo(_line(resolution))
            if not found and not resolver.came:
                typer.echo(f"nobody came within {wait:g} s; workers come that wait for a sender at this address")
            elif not found:
                typer.echo(f"nobody who is in doubt came within {wait:g} s; others did: {some(resolver.came)}")
        open_ones = [str(resolution.doubt) for resolution in found if resolution.decision is None]
        if open_ones and as_json:
            raise typer.Exit(1)
        if open_ones:
            raise TransferInDoubt(
                "nobody who came knows what was decided; wait for the others, or say --commit or --abort if they "
                "never come",
                open_ones,
            )


def _line(resolution: Resolution) -> str:
    if resolution.decision is None:
        return f"{resolution.doubt}: in doubt still"
    told = f"{resolution.doubt}: told to {resolution.decision.name.lower()}"
    return f"{told}, by hand" if resolution.by_hand else told


def _as_dict(resolution: Resolution) -> dict[str, object]:
    doubt = resolution.doubt
    return {
        "version": doubt.version,
        "decision": None if resolution.decision is None else resolution.decision.name.lower(),
        "by_hand": resolution.by_hand,
        "told": [{"place": place, "outcome": outcome.value} for place, outcome in doubt.told],
        "members": [{"place": seat.place, "size": seat.size, "name": seat.name} for seat in doubt.members],
        "absent": list(doubt.absent),
    }
