"""``hotweights plan``: which tensors of a checkpoint become which of a model. It reads headers only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..engines import transformers
from ..plan.plan import LoadPlan, Order
from ..sources.opening import open as open_source
from ..tracing.trace import trace
from .outcome import ending, print_json


def plan(
    path: Annotated[Path, typer.Argument(help="The checkpoint: a file, a directory, an index, a hub cache.")],
    model: Annotated[Path, typer.Option(help="A directory with the config.json of a transformers model.")],
    order: Annotated[Order, typer.Option(help="What is read first.")] = "file",
    explain: Annotated[str | None, typer.Option(help="Tell all about one tensor instead.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan to a file.")] = None,
    limit: Annotated[int, typer.Option(help="Steps to list at most; 0 for all.", min=0)] = 40,
    allow_missing: Annotated[list[str] | None, typer.Option(help="Names that may be missing, * is any.")] = None,
    allow_unexpected: Annotated[list[str] | None, typer.Option(help="Names that may have no place.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Plan the loading of a checkpoint into a model built from its config. No weight is read, none is written."""
    with ending(as_json=as_json), open_source(path) as source:
        made = trace(
            transformers.build(model),
            source.manifest,
            device="cpu",
            allow_missing=allow_missing or (),
            allow_unexpected=allow_unexpected or (),
        ).ordered(order, source.position)
        if save is not None:
            made.save(save)
        if as_json:
            print_json(_as_dict(made, explain))
        elif explain is not None:
            typer.echo(made.explain(explain))
        else:
            _print(made, limit)


def _as_dict(made: LoadPlan, explain: str | None) -> dict[str, object]:
    if explain is not None:
        return {"name": explain, "explanation": made.explain(explain)}
    return {
        "steps": [
            {
                "level": level,
                "sources": list(step.sources),
                "destinations": list(dict.fromkeys(step.destinations)),
            }
            for level, step in zip(made.levels or [0] * len(made.steps), made.steps, strict=True)
        ],
        "ties": [[first.source, second.source] for first, second in made.ties],
        "fates": {name: fate.value for name, fate in made.fates.items()},
        "casts": dict(made.casts),
        "fallback": list(made.fallback),
        "graph_breaks": [str(note) for note in made.graph_breaks],
    }


def _print(made: LoadPlan, limit: int) -> None:
    console = Console(highlight=False, markup=False)  # [0:8, :] is no markup
    if not console.is_terminal:
        console.width = 240  # Whoever searches the output must find whole names.
    table = Table(box=None, header_style="bold")
    for title in ("of the model", "is made by", "from the checkpoint"):
        table.add_column(title, overflow="fold")
    rows = [row for step in made.steps[: limit or None] for row in made.rows(step)]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    hidden = len(made.steps) - limit
    if limit and hidden > 0:
        console.print(f"... and {hidden} more; --limit 0 lists all")
    console.print(str(made))
