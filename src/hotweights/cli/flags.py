"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..dtypes import Cast

# Not from READERS, which needs torch. A test compares them.
_READERS = "hotweights, fastsafetensors, runai, safetensors, torch"

# No Path: it would make one slash of the two in an address.


def named(path: str) -> str:
    """The path, which names something: to the library an empty one is the directory where one is."""
    if not path:
        raise typer.BadParameter("the path is empty; is a variable of the shell not set?")
    return path


Checkpoint = Annotated[
    str,
    typer.Argument(help="A safetensors file, a checkpoint directory, an index, a hub cache.", callback=named),
]
CheckpointOrNone = Annotated[
    str | None,
    typer.Argument(
        help="A safetensors file, a checkpoint directory, an index, a hub cache.",
        metavar="PATH",
        callback=lambda path: None if path is None else named(path),
    ),
]
Checkpoints = Annotated[
    list[str] | None,
    typer.Argument(
        help="Safetensors files, checkpoint directories, indexes, hub caches.",
        metavar="PATH...",
        callback=lambda paths: paths and [named(path) for path in paths],
    ),
]
FilesFrom = Annotated[
    Path | None,
    typer.Option(
        help="A file that names one path a line, or ends each with a zero byte; - is standard input.", allow_dash=True
    ),
]
Model = Annotated[Path, typer.Option(help="A directory with the config.json of a transformers model.")]
Reader = Annotated[str, typer.Option(help=f"Which package reads the files: {_READERS}.")]
Variant = Annotated[str | None, typer.Option(help="Which variant of the weights in the directory, such as fp16.")]
Subfolder = Annotated[str | None, typer.Option(help="Which folder in the directory, such as transformer.")]
Device = Annotated[str, typer.Option(help="The device on which parameters are created.")]
Limit = Annotated[int, typer.Option(help="How many to list at most; 0 for all.", min=0)]
AllowMissing = Annotated[
    list[str] | None, typer.Option(help="Names of the model that the checkpoint may lack; * stands for anything.")
]
AllowUnexpected = Annotated[
    list[str] | None, typer.Option(help="Tensors of the checkpoint that may have no place in the model.")
]
AllowMismatched = Annotated[
    list[str] | None, typer.Option(help="Names whose shape may differ; they keep what the model's own code makes.")
]
Casts = Annotated[
    Cast | None,
    typer.Option(help="Casts that lose information: error does none, floats those from float to float, loader all."),
]
Keys = Annotated[
    str | None, typer.Option(help="The directory of the job's keys, for tcps: addresses; `hotweights keys` makes it.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Go without keys where anybody on the network may send and take weights.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON document in each line.")]
JsonOfSeveral = Annotated[
    bool, typer.Option("--json", help="Print one JSON document; for several paths, one in each line.")
]
