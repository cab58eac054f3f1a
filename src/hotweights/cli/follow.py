"""``hotweights follow``: a line for each checkpoint that appears in a directory, when its writer is done with it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..errors import CheckpointError
from ..sources.follow import follow as versions_in
from . import flags
from .deadline import Deadline
from .outcome import ending, shown


def follow(
    directory: Annotated[
        str, typer.Argument(help="Where checkpoints appear, or one that is written anew: a directory or an address.")
    ],
    versions: Annotated[int | None, typer.Option(help="End after so many; fewer are exit code 1.", min=1)] = None,
    interval: Annotated[float, typer.Option(help="Seconds for which no file of a version may have changed.")] = 1.0,
    timeout: Annotated[float | None, typer.Option(help="Seconds to wait for the next version; else for ever.")] = None,
    latest: Annotated[bool, typer.Option("--latest", help="Of several that are ready only the newest.")] = False,
    marker: Annotated[str | None, typer.Option(help="A file that is written last into each version.")] = None,
    pattern: Annotated[str, typer.Option(help="Which directories are versions, such as step-*.")] = "*",
    deadline: Deadline = None,
    as_json: flags.JsonLines = False,
) -> None:
    """Print the name and the path of each checkpoint that appears in a directory, when it is whole."""
    with (
        ending(as_json=as_json, json_lines=True, about={"path": str(directory)}),
        versions_in(
            directory,
            interval=interval,
            timeout=timeout,
            latest=latest,
            marker=marker,
            pattern=pattern,
            deadline=deadline,
        ) as arriving,
    ):
        count = 0
        for count, version in enumerate(arriving, 1):
            found = {"name": version.name, "path": str(version.path)}
            typer.echo(json.dumps(found) if as_json else "\t".join(map(shown, found.values())))
            if count == versions:
                return
        if as_json and arriving.passed_over:
            typer.echo(json.dumps({"path": directory, "passed_over": arriving.passed_over}))
        are = f"versions are folders like {pattern}, with safetensors in them"
        if timeout is not None and interval >= timeout:
            are += f", in which nothing has changed for --interval {interval:g} s: longer than --timeout"
        seen = "".join(f"; passed over {name}: {why}" for name, why in arriving.passed_over.items())
        if versions is not None:
            raise CheckpointError(
                f"{directory}: {count} of {versions} versions came; the next did not within {timeout:g} s; {are}{seen}",
                cause="timeout",
            )
        if not count:
            typer.echo(shown(f"{directory}: no version came within {timeout:g} s; {are}{seen}"), err=True)
