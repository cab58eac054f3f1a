"""``hotweights plan``: which tensors of a checkpoint become which of a model. It reads headers, no weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import PlanFileError
from ..text import columns
from . import flags
from .fleet import print_fleet
from .noise import hide_noise
from .outcome import ending, print_json
from .output import is_plan, may_write

if TYPE_CHECKING:
    from ..plan.plan import LoadPlan


def plan(
    path: flags.CheckpointOrNone = None,
    model: Annotated[
        str | None,
        typer.Option(help="A directory with the config.json of a transformers model, or package.module:factory."),
    ] = None,
    order: Annotated[
        Literal["layer", "file", "given"], typer.Option(help="Read layer by layer, as in the files, or as traced.")
    ] = "file",
    explain: Annotated[str | None, typer.Option(help="Explain one tensor instead.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan to a file.")] = None,
    limit: flags.Limit = 40,
    allow_missing: flags.AllowMissing = None,
    allow_unexpected: flags.AllowUnexpected = None,
    allow_mismatched: flags.AllowMismatched = None,
    cast: flags.Casts = None,
    variant: flags.Variant = None,
    subfolder: flags.Subfolder = None,
    fleet: Annotated[
        str | None,
        typer.Option(help="Instead: what a version costs between many hosts, on paper, such as hosts=125,gbits=400."),
    ] = None,
    as_json: flags.Json = False,
) -> None:
    """Plan the loading of a checkpoint into a model from a config or a factory. No weight is read or written."""
    if fleet is not None:
        print_fleet(fleet, path, as_json)
        return
    if path is None or model is None:
        raise typer.BadParameter("a checkpoint is needed, and --model; or --fleet", param_hint="PATH")
    with ending(as_json=as_json, about={"path": path}):
        may_write("--save", save, is_plan)
        hide_noise()
        from ..sources.opening import open as open_source  # They wait for torch, which wrong usage need not.
        from ..tracing.trace import trace
        from .model import model_from

        with open_source(path, variant=variant, subfolder=subfolder) as source:
            built = model_from(model)
            load_plan = trace(
                built,
                source.manifest,
                device="cpu",
                allow_missing=allow_missing or (),
                allow_unexpected=allow_unexpected or (),
                allow_mismatched=allow_mismatched or (),
                cast=cast,
            ).ordered(order, source.position)
            if save is not None:
                _save(load_plan, save)
            if as_json:
                print_json({"path": path, **_as_dict(load_plan, explain)})
            elif explain is not None:
                typer.echo(load_plan.explain(explain))
            else:
                _print(load_plan, limit)


def _save(load_plan: LoadPlan, to: Path) -> None:
    try:
        load_plan.save(to)
    except OSError as error:
        raise PlanFileError(f"{to}: cannot be written: {error.strerror}") from error


def _as_dict(load_plan: LoadPlan, explain: str | None) -> dict[str, object]:
    if explain is not None:
        return {"name": explain, "explanation": load_plan.explain(explain)}
    return {
        "steps": [
            {
                "level": level,
                "sources": list(step.sources),
                "destinations": list(dict.fromkeys(step.destinations)),
            }
            for level, step in zip(load_plan.levels or [0] * len(load_plan.steps), load_plan.steps, strict=True)
        ],
        "ties": [[first.source, second.source] for first, second in load_plan.ties],
        "fates": {name: fate.value for name, fate in load_plan.fates.items()},
        "casts": dict(load_plan.casts),
        "fallback": list(load_plan.fallback),
        "graph_breaks": [str(note) for note in load_plan.graph_breaks],
        "mismatched": dict(load_plan.mismatched),
        "unproven": list(load_plan.unproven),
        "side_effects": list(load_plan.side_effects),
        "processed": list(load_plan.processed),
    }


def _print(load_plan: LoadPlan, limit: int) -> None:
    rows = [row for step in load_plan.steps[: limit or None] for row in load_plan.rows(step)]
    typer.echo(columns([("of the model", "is made by", "from the checkpoint"), *rows]))
    hidden = len(load_plan.steps) - limit
    if limit and hidden > 0:
        typer.echo(f"... and {hidden} more; --limit 0 lists all")
    typer.echo(str(load_plan))
