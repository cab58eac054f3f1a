"""``hotweights load``: load a checkpoint into a transformers model: does it fit, how fast, in how much memory?"""

from __future__ import annotations

from typing import Annotated

import typer

from ..engines import transformers
from ..loading.load import load as load_weights
from ..sources.contracts import IOMode
from ..sources.opening import open as open_source
from . import flags
from .dtype import dtype_from
from .outcome import ending, print_json


def load(
    path: flags.Checkpoint,
    model: flags.Model,
    reader: flags.Reader = "hotweights",
    device: flags.Device = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the parameters (BF16, F32, ...); else the config's.")
    ] = None,
    cast: flags.Casts = None,
    io: Annotated[IOMode, typer.Option(help="buffered reads through the page cache, direct around it.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="How many threads read.", min=1)] = None,
    allow_missing: flags.AllowMissing = None,
    allow_unexpected: flags.AllowUnexpected = None,
    variant: flags.Variant = None,
    subfolder: flags.Subfolder = None,
    as_json: flags.Json = False,
) -> None:
    """Build a model from its config, load a checkpoint into it, and report. The model is thrown away."""
    with (
        ending(as_json=as_json),
        open_source(path, reader=reader, variant=variant, subfolder=subfolder) as source,
    ):
        built = transformers.build(model, dtype=dtype_from(dtype))
        report = load_weights(
            built,
            source,
            device=device,
            allow_missing=allow_missing or (),
            allow_unexpected=allow_unexpected or (),
            cast=cast,
            io=io,
            threads=threads,
        )
        if as_json:
            print_json(report.as_dict())
        else:
            typer.echo(f"{type(built).__name__} from {path}")
            typer.echo(str(report))
