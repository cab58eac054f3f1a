"""``hotweights load``: load a checkpoint into a transformers model: does it fit, how fast, in how much memory?"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from . import flags
from .noise import hide_noise
from .outcome import ending, print_json, shown


def load(
    path: flags.Checkpoint,
    model: Annotated[
        str, typer.Option(help="A directory with the config.json of a transformers model, or package.module:factory.")
    ],
    reader: flags.Reader = "hotweights",
    device: flags.Device = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the parameters (BF16, F32, ...); else the config's.")
    ] = None,
    cast: flags.Casts = None,
    io: Annotated[
        Literal["auto", "buffered", "direct"],
        typer.Option(help="buffered reads through the page cache, direct around it."),
    ] = "auto",
    threads: Annotated[int | None, typer.Option(help="How many threads read.", min=1)] = None,
    allow_missing: flags.AllowMissing = None,
    allow_unexpected: flags.AllowUnexpected = None,
    allow_mismatched: flags.AllowMismatched = None,
    variant: flags.Variant = None,
    subfolder: flags.Subfolder = None,
    as_json: flags.Json = False,
) -> None:
    """Build a model from its config, load a checkpoint into it, and report. The model is thrown away."""
    with ending(as_json=as_json, about={"path": path}):
        hide_noise()
        from ..loading.load import load as load_weights  # They wait for torch, which wrong usage need not.
        from ..sources.opening import open as open_source
        from .dtype import dtype_from
        from .model import model_from

        with open_source(path, reader=reader, variant=variant, subfolder=subfolder) as source:
            built = model_from(model, dtype_from(dtype), device=device)
            report = load_weights(
                built,
                source,
                device=device,
                allow_missing=allow_missing or (),
                allow_unexpected=allow_unexpected or (),
                allow_mismatched=allow_mismatched or (),
                cast=cast,
                io=io,
                threads=threads,
            )
            if as_json:
                print_json({"path": path, **report.as_dict()})
            else:
                typer.echo(f"{type(built).__name__} from {shown(path)}")
                typer.echo(str(report))
