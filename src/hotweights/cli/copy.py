"""``hotweights copy`` and ``convert``: a checkpoint to another place, all or nothing, a tensor at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from ..errors import SaveError, UsageError
from ..sources.opening import open as open_source
from ..sources.save import SaveReport, save
from . import flags
from .dtype import dtype_from
from .outcome import ending, print_json

# No Path: it would make one slash of the two in an address.
Target = Annotated[str, typer.Argument(help="A directory, a file that ends in .safetensors, or an address of a store.")]
ShardSize = Annotated[str | None, typer.Option(help="Bytes of one file at most, such as 5GB.")]
# What lies beside weights and is none: configurations, tokenizers, texts.
_BESIDE = (".json", ".txt", ".model", ".md", ".jinja", ".py", ".tiktoken", ".yaml")


def copy(
    path: flags.Checkpoint,
    to: Target,
    shard_size: ShardSize = None,
    variant: flags.Variant = None,
    subfolder: flags.Subfolder = None,
    as_json: flags.Json = False,
) -> None:
    """Copy a checkpoint, with the configuration beside it, all or nothing; then read the copy and compare it."""
    with ending(as_json=as_json):
        _copy(From(path, "hotweights", variant, subfolder), to, None, shard_size, as_json)


def convert(
    path: flags.Checkpoint,
    to: Target,
    dtype: Annotated[str | None, typer.Option(help="What floats of 16 bits and more become: BF16, F32, ...")] = None,
    shard_size: ShardSize = None,
    reader: flags.Reader = "hotweights",
    variant: flags.Variant = None,
    subfolder: flags.Subfolder = None,
    as_json: flags.Json = False,
) -> None:
    """Write a checkpoint anew: another dtype, other shards, or .bin (--reader torch) as safetensors."""
    with ending(as_json=as_json):
        _copy(From(path, reader, variant, subfolder), to, dtype, shard_size, as_json)


class From(NamedTuple):
    """Which weights are read, and by what."""

    path: str
    reader: str
    variant: str | None
    subfolder: str | None


def _copy(which: From, to: str, dtype: str | None, shard_size: str | None, as_json: bool) -> None:
    path, reader, variant, subfolder = which
    if os.path.realpath(path) == os.path.realpath(to):
        raise UsageError(f"{to}: is what is read; name another place")
    with open_source(path, reader=reader, variant=variant, subfolder=subfolder) as source:
        beside = (
            _beside(Path(source.files[0]).parent) if os.path.isdir(path) and not to.endswith(".safetensors") else []
        )
        report = save(source, to, shard_size=shard_size, dtype=dtype_from(dtype), beside=beside)
    _compare(report)
    if as_json:
        print_json(report.as_dict())
    else:
        typer.echo(f"{to} from {path}")
        typer.echo(str(report))


def _compare(report: SaveReport) -> None:
    with open_source(report.path) as written:
        if (digest := written.digest()) != report.digest:
            wrong = [name for name, known in report.digest.tensors.items() if digest.tensors.get(name) != known]
            raise SaveError(
                f"{report.path}: what was written reads back otherwise; the disk is not to be trusted", wrong
            )


def _beside(directory: Path) -> list[Path]:
    return [
        file
        for file in sorted(directory.iterdir())
        if file.is_file() and file.suffix in _BESIDE and not file.name.startswith(".")
        if not file.name.endswith(".index.json")
    ]
