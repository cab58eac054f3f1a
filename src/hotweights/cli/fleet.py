"""``hotweights plan --fleet``: what a version costs between many hosts, on paper."""

from __future__ import annotations

import typer

from .outcome import ending, print_json


def print_fleet(words: str, path: str | None, as_json: bool) -> None:
    """Print bytes, seconds and messages; of a checkpoint, where there is one."""
    with ending(as_json=as_json, about={} if path is None else {"path": path}):
        from ..sources.opening import open as open_source  # It waits for torch, which wrong usage need not.
        from ..transfer.fleet import fleet_of

        known: dict[str, float] = {}
        if path is not None:
            with open_source(path) as source:
                specs = source.manifest.values()
                nbytes = sum(spec.nbytes for spec in specs)
                known = {"parameters": float(nbytes), "bytes_per_parameter": 1.0, "tensors": float(len(specs))}
        fleet = fleet_of(words, **known)
        if as_json:
            print_json(fleet.as_dict())
        else:
            typer.echo(str(fleet))
