"""``hotweights copy`` and ``convert``: a checkpoint to another place, all or nothing, a tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from ..errors import CheckpointError, SaveError, UsageError
from ..text import some
from . import flags
from .deadline import Deadline, deadline_of
from .outcome import ending, print_json, shown
from .output import check_target

if TYPE_CHECKING:
    from ..sources.files.belongings import Belongings
    from ..sources.save import SaveReport

# No Path: it would make one slash of the two in an address.
Target = Annotated[
    str,
    typer.Argument(
        help="A directory, a file that ends in .safetensors, or an address of a store.", callback=flags.named
    ),
]
ShardSize = Annotated[
    str | None,
    typer.Option(
        help="Bytes of one file at most, such as 5GB; a larger tensor has a file of its own. By default one file, "
        "whatever the source had."
    ),
]


def copy(
    path: flags.Checkpoint,
    to: Target,
    shard_size: ShardSize = None,
    variant: flags.Variant = None,
    subfolder: flags.Subfolder = None,
    deadline: Deadline = None,
    as_json: flags.Json = False,
) -> None:
    """Copy a checkpoint, with the configuration beside it, all or nothing; then read the copy and compare it."""
    with ending(as_json=as_json, about={"from": path, "path": to}):
        _copy(From(path, "hotweights", variant, subfolder), to, As(None, "error", shard_size), deadline, as_json)


def convert(
    path: flags.Checkpoint,
    to: Target,
    dtype: Annotated[str | None, typer.Option(help="What floats of 16 bits and more become: BF16, F32, ...")] = None,
    overflow: Annotated[
        Literal["error", "saturate"],
        typer.Option(help="What becomes of values beyond the dtype's largest: an error, or that largest value."),
    ] = "error",
    shard_size: ShardSize = None,
    reader: flags.Reader = "hotweights",
    variant: flags.Variant = None,
    subfolder: flags.Subfolder = None,
    deadline: Deadline = None,
    as_json: flags.Json = False,
) -> None:
    """Write a checkpoint anew: another dtype, other shards, or .bin (--reader torch) as safetensors."""
    with ending(as_json=as_json, about={"from": path, "path": to}):
        _copy(From(path, reader, variant, subfolder), to, As(dtype, overflow, shard_size), deadline, as_json)


class From(NamedTuple):
    """Which weights are read, and by what."""

    path: str
    reader: str
    variant: str | None
    subfolder: str | None


class As(NamedTuple):
    """How weights are written."""

    dtype: str | None
    overflow: Literal["error", "saturate"]
    shard_size: str | None


def _copy(which: From, to: str, how: As, deadline: float | None, as_json: bool) -> None:
    from ..sources.opening import open as open_source  # They wait for torch, which wrong usage need not.
    from ..sources.save import save
    from .dtype import dtype_from

    path, reader, variant, subfolder = which
    seconds = deadline_of(deadline, (path, to))
    if os.path.realpath(path) == os.path.realpath(to):
        raise UsageError(f"{to}: is what is read; name another place")
    with open_source(path, reader=reader, variant=variant, subfolder=subfolder, deadline=seconds(path)) as source:
        check_target(to, source.files)
        with _along(path, to, source) as along:
            report = save(
                source,
                to,
                shard_size=how.shard_size,
                dtype=dtype_from(how.dtype),
                overflow=how.overflow,
                beside=along.files,
                deadline=seconds(to),
            )
    _compare(report, seconds(to))
    if as_json:
        print_json({"from": path, **report.as_dict(), "beside": list(along.files), "left": along.left})
        return
    typer.echo(f"{shown(to)} from {shown(path)}")
    typer.echo(str(report))
    if along.files:
        typer.echo(f"    beside  {len(along.files)} files: {shown(some(list(along.files), 5))}")
    for name, why in along.left.items():
        typer.echo(f"      left  {shown(name)}: {why}")


@contextmanager
def _along(path: str, to: str, source: Any) -> Iterator[Belongings]:
    """What lies beside the weights, as files on this disk."""
    from ..sources.files.belongings import Belongings, belongings
    from ..sources.objects.address import names_a_folder
    from ..sources.objects.source import ObjectSource

    takes = os.path.isdir(to) or not to.endswith(".safetensors")
    if not takes or not (os.path.isdir(path) or names_a_folder(path)):
        yield Belongings()
    elif isinstance(source, ObjectSource):
        with TemporaryDirectory(prefix="hotweights-") as folder:
            yield source.belongings(Path(folder))
    else:
        yield belongings(Path(source.files[0]).parent, source.files)


def _compare(report: SaveReport, deadline: float | None) -> None:
    from ..sources.opening import open as open_source

    try:
        with open_source(report.path, deadline=deadline) as written:
            digest = written.digest()
    except CheckpointError as error:
        error.add_note(f"{report.path} was written whole by then; what failed is to read it back and compare it")
        raise
    if digest != report.digest:
        wrong = [name for name, known in report.digest.tensors.items() if digest.tensors.get(name) != known]
        raise SaveError(f"{report.path}: what was written reads back otherwise; the disk is not to be trusted", wrong)
