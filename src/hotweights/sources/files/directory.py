"""Directory: which of its files are the checkpoint, by their names alone. docs/sources.md tells the rule to users."""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple, overload

from ...errors import CheckpointError
from ...text import some
from ..dcp.place import is_dcp, rank_parts, unfinished_dcp
from .index import files_named_by, lies_outside
from .layout import DIFFUSERS, Layout
from .place import Place, Remote, exists, is_dir, names_in, text_of

_OTHER, _LAST = 10, 20  # ranks; a known stem's rank is its place in the layout
# Opened only where nothing else lies: what tools put beside a model's own weights. In the order of preference.
_BESIDE = (
    "consolidated",
    "adapter_model|pytorch_lora_weights",
    "optim|scheduler|scaler|sampler|random_states|rng_state",
)
_PART_OF_DOWNLOAD = re.compile(r".+\.(incomplete|tmp|temp|part|partial|crdownload|download|aria2)")
_SHOWN = 8  # folders that an error offers by name
_COMPONENTS = 200  # folders that are looked into, to name those with weights


@dataclass(frozen=True, slots=True)
class Choice:
    """The files of one checkpoint in a directory.

    Attributes:
        files: their names; none if an index names them.
        index: the index's name; ``None`` if the names of the files are enough.
        known: whether ``from_pretrained`` looks for these names.
        others: names of files that look like weights too, and that this choice passes over.
    """

    files: tuple[str, ...]
    index: str | None
    known: bool
    others: tuple[str, ...] = ()


class _Named(NamedTuple):
    """What a file's name says."""

    name: str
    stem: str
    variant: str | None
    total: str | None  # as in model-00001-of-00003
    is_index: bool
    rank: int


@overload
def snapshot(directory: Path) -> Path: ...
@overload
def snapshot(directory: Place) -> Place: ...
def snapshot(directory: Place) -> Place:
    """The snapshot that a hub cache's ``models--org--name`` directory leads to; any other directory as it is."""
    if isinstance(directory, Remote):
        return directory
    snapshots = directory / "snapshots"
    name = os.path.basename(os.path.abspath(directory))  # "." has no name of its own
    if not (name.startswith("models--") and snapshots.is_dir()):
        return directory
    main = directory / "refs" / "main"
    if main.is_file():
        snapshot = snapshots / main.read_text(errors="replace").strip()
        if not snapshot.is_dir():
            raise CheckpointError(
                f"{directory}: refs/main names the snapshot {snapshot.name!r}, which is not there", cause="not_found"
            )
        return snapshot
    revisions = sorted(snapshots.iterdir())
    if len(revisions) == 1:
        return revisions[0]
    raise CheckpointError(
        f"{directory}: {len(revisions)} snapshots and no refs/main; open the one you mean", cause="ambiguous"
    )


@overload
def folder_in(directory: Path, subfolder: str | None, layout: Layout) -> Path: ...
@overload
def folder_in(directory: Place, subfolder: str | None, layout: Layout) -> Place: ...
def folder_in(directory: Place, subfolder: str | None, layout: Layout) -> Place:
    """The folder of that name in the directory."""
    folder = directory / subfolder if subfolder else directory
    if not is_dir(folder):
        raise CheckpointError(
            f"{folder}: there is no such folder{_choose_folder(directory, names_in(directory), layout)}",
            cause="not_found",
        )
    return folder


def find(directory: Place, layout: Layout, variant: str | None = None) -> Choice:
    """Which files of the directory are the checkpoint.

    Raises:
        CheckpointError: none, or several, and nothing says which; it says what to type.
    """
    names = names_in(directory)
    if parts := rank_parts(names):
        remote = isinstance(directory, Remote)
        cure = "download the folder, and open that" if remote else f"hotweights.open({str(directory)!r}) does so"
        raise CheckpointError(
            f"{directory}: holds {some(parts, 3)}, in which each rank of a trainer wrote its parts of tensors; only "
            f"our own reader puts these together, and on disk; {cure}",
            cause="other_format",
        )
    choice = _choose(directory, names, layout, variant)
    if "model_index.json" in names and not (choice and choice.known):
        itself = f", or open {directory / choice.files[0]} itself" if choice and choice.files else ""
        folders = _choose_folder(directory, names, layout)
        raise CheckpointError(f"{directory}: holds a pipeline of several models{folders}{itself}", cause="ambiguous")
    if choice is None:
        begun = variant is None and _begun(names, layout)
        why = _nothing(directory, names, layout, variant)
        # Spelt out twice: a test finds every cause by these words.
        raise CheckpointError(why, cause="unfinished") if begun else CheckpointError(why, cause="no_weights")
    return choice


def _choose(directory: Place, names: Sequence[str], layout: Layout, variant: str | None = None) -> Choice | None:
    """Which files of the directory are the checkpoint; ``None`` if none can be.

    Raises:
        CheckpointError: several can, and nothing says which; what to type is said.
    """
    if variant is None and (choice := _said_by_config(directory, layout)) is not None:
        return choice
    every = _parsed(names, layout, variant)
    asked = [file for file in every if file.variant == variant]
    variants = sorted({file.variant for file in every if file.variant is not None and file.rank <= _OTHER})
    if variant is None and variants and not any(file.rank <= _OTHER for file in asked):
        if len(variants) > 1:
            ways = " or ".join(f'variant="{name}"' for name in variants)
            raise CheckpointError(
                f"{directory}: holds several variants of the weights; choose one: {ways}", cause="ambiguous"
            )
        asked = [file for file in every if file.variant == variants[0]]
    candidates = _best(directory, asked, layout)
    if len(candidates) > 1:
        raise CheckpointError(
            f"{directory}: holds several checkpoints, and nothing says which is meant; open the one you mean, or a "
            "list of files where they are one checkpoint together: hotweights.open([file, file])",
            [_how_to_open(directory, choice, layout) for choice in candidates],
            cause="ambiguous",
        )
    return replace(candidates[0], others=_others(names, asked, candidates[0], layout)) if candidates else None


def _components(directory: Place, names: Iterable[str], layout: Layout) -> list[str]:
    """The folders in the directory that hold weights."""
    folders = (name for name in names if not name.startswith(".") and is_dir(directory / name))
    return [folder for folder in islice(folders, _COMPONENTS) if _holds_weights(directory / folder, layout)]


def unfinished(name: str, names: Iterable[str]) -> str | None:
    """The name of what a download of the file left beside it, or in its place, before its end."""
    return next((other for other in names if other.startswith(f"{name}.") and _PART_OF_DOWNLOAD.fullmatch(other)), None)


def _nothing(directory: Place, names: Sequence[str], layout: Layout, variant: str | None) -> str:
    """Why there is no checkpoint in the directory, and what to type instead."""
    if variant is not None:
        there = {file.variant for file in _parsed(names, layout, None)}
        ways = [f'variant="{name}"' for name in sorted(filter(None, there))] + ["no variant="] * (None in there)
        cure = f"; give {' or '.join(ways)}" if ways else ""
        return f"{directory}: no {layout.stems[0]}.{variant}{layout.suffix} in this directory{cure}"
    if layout.suffix == ".safetensors" and (why := unfinished_dcp(names)) is not None:
        return f"{directory}: {why}"
    if layout.suffix == ".bin" and (whole := [name for name in names if name.endswith(".safetensors")]):
        return f'{directory}: no *.bin in this directory; it holds {some(whole, 3)}: leave reader="torch" out'
    content = f"it holds {some(names, 5)}" if names else "it is empty"
    if layout.suffix != ".bin" and any(name.endswith(".bin") for name in names):
        content += '; reader="torch" of hotweights.open, whose source load and update take, opens .bin files'
    if begun := _begun(names, layout):
        content += f"; the download of {begun[0]} has not ended"
    return f"{directory}: no *{layout.suffix} in this directory; {content}{_choose_folder(directory, names, layout)}"


def _begun(names: Iterable[str], layout: Layout) -> list[str]:
    """Files of weights whose download has not ended."""
    return [
        name
        for name in names
        if layout.suffix in name and not name.startswith(".") and _PART_OF_DOWNLOAD.fullmatch(name)
    ]


def _choose_folder(directory: Place, names: Sequence[str], layout: Layout) -> str:
    folders = _components(directory, names, layout)
    if not folders:
        return ""
    if len(folders) > _SHOWN:
        least = "at least " if len(names) > _COMPONENTS else ""  # Not all of them were looked into.
        every = (
            ""
            if isinstance(directory, Remote)
            else f", or list all: hotweights inspect {shlex.quote(str(directory))}/*"
        )
        return (
            f"; {least}{len(folders)} folders in it hold weights; open one of them by its own path, such as "
            f"{directory / folders[0]}{every}"
        )
    return f"; choose one: {' or '.join(f'subfolder={json.dumps(name)}' for name in folders)}"


def _holds_weights(folder: Place, layout: Layout) -> bool:
    try:
        names = names_in(folder)
    except CheckpointError:
        return False
    return bool(_parsed(names, layout, None)) or (layout.suffix == ".safetensors" and is_dcp(names))


def _parsed(names: Iterable[str], layout: Layout, variant: str | None) -> list[_Named]:
    """The files that hold weights or name files that do, by their names. Hidden ones are the system's (``._*``)."""
    suffix = re.escape(layout.suffix)
    weights = re.compile(rf"(.+?)(?:-\d+-of-(\d+)(?:\.([\w-]+))?)?{suffix}")
    index = re.compile(rf"(.+?){suffix}(?:\.([\w-]+))?\.index(?:\.([\w-]+))?\.json")
    found: list[tuple[str, str, str | None, str | None, bool]] = []
    for name in names:
        if name.startswith("."):
            continue
        if match := weights.fullmatch(name):
            found.append((name, match[1], match[3], match[2], False))
        elif match := index.fullmatch(name):
            found.append((name, match[1], match[2] or match[3], None, True))
    bases = {stem for _, stem, *_ in found} | {*layout.stems, "adapter_model", "pytorch_lora_weights"}
    parsed = []
    for name, stem, said, total, is_index in found:
        head, _, tail = stem.rpartition(".")
        # Of model.fp16 and weights.00, only the first is a variant; v1.5-pruned is one only beside a v1.
        if said is None and head and (tail == variant or (head in bases and not tail.isdigit())):
            stem, said = head, tail
        parsed.append(_Named(name, stem, said, total, is_index, _rank(stem, layout)))
    return parsed


def _rank(stem: str, layout: Layout) -> int:
    if stem in layout.stems:
        return layout.stems.index(stem)
    return next((_LAST + place for place, names in enumerate(_BESIDE) if re.match(names, stem)), _OTHER)


def named_by_config(config: Place, layout: Layout) -> str | None:
    """The name of the file of weights that a ``config.json`` says to transformers, where it does."""
    try:
        name = json.loads(text_of(config)).get("transformers_weights")
    except (OSError, CheckpointError, ValueError, AttributeError, RecursionError):
        return None
    return name if isinstance(name, str) and name.endswith((layout.suffix, f"{layout.suffix}.index.json")) else None


def _said_by_config(directory: Place, layout: Layout) -> Choice | None:
    """The file that ``config.json`` names for transformers, where it does."""
    name = named_by_config(directory / "config.json", layout)
    if name is None:
        return None
    if lies_outside(name) or not exists(directory / name):
        raise CheckpointError(
            f"{directory}: config.json says that the weights are in {name!r}, which is not there", cause="missing_shard"
        )
    return Choice((), name, known=True) if name.endswith(".json") else Choice((name,), None, known=True)


def _best(directory: Place, files: Sequence[_Named], layout: Layout) -> list[Choice]:
    """The candidates of the best rank: one for each stem, and for each total of numbered files without an index."""
    left = [file for file in files if file.rank < _OTHER and (file.is_index or file.total is None)]
    if not left:
        # An index by any name speaks for the files that it names: they are no candidates of their own.
        named = [files_named_by(directory / file.name) for file in files if file.is_index]
        left = [file for file in files if not any(file.name in names for names in named)]
    best = [file for file in left if file.rank == min(other.rank for other in left)]
    choices: list[Choice] = []
    for stem in dict.fromkeys(_family(file) for file in best):
        mine = [file for file in best if _family(file) == stem]
        choices += _ways(mine, index_first=stem == DIFFUSERS)
    return choices


def _family(file: _Named) -> str:
    """Files whose names differ by a number at the end are of one checkpoint: ``layers-0``, ``layers-1``."""
    return file.stem if file.rank < _OTHER else re.sub(r"\d+$", "#", file.stem)


def _ways(files: Sequence[_Named], *, index_first: bool) -> list[Choice]:
    known = files[0].rank < _OTHER
    whole = [
        Choice(names, None, known) for names in [tuple(f.name for f in files if not (f.is_index or f.total))] if names
    ]
    index = [Choice((), file.name, known) for file in files if file.is_index][:1]
    totals = dict.fromkeys(file.total for file in files if file.total)
    numbered = [Choice(tuple(f.name for f in files if f.total == total), None, known) for total in totals]
    return (index or whole or numbered) if index_first else (whole or index or numbered)


def _others(names: Sequence[str], files: Sequence[_Named], choice: Choice, layout: Layout) -> tuple[str, ...]:
    mine = {*choice.files, choice.index}
    ours = [file.name for file in files if file.rank <= _OTHER and file.name not in mine]
    begun = (name for name in names if layout.suffix in name and _PART_OF_DOWNLOAD.fullmatch(name))
    return (*ours, *begun)


def _how_to_open(directory: Place, choice: Choice, layout: Layout) -> str:
    """What to type, in Python."""
    if choice.index or len(choice.files) == 1:
        name = choice.index or choice.files[0]
        return f"{name}: hotweights.open({str(directory / name)!r})"
    number = rf"(?<=-)\d+(?=-of-\d+)|\d+(?={re.escape(layout.suffix)}$)"
    if isinstance(directory, Remote):
        return f"{some(choice.files, 3)}: hotweights.open({[str(directory / name) for name in choice.files]!r})"
    pattern = re.sub(number, "*", glob.escape(choice.files[0]), count=1)
    return f"{some(choice.files, 3)}: hotweights.open(sorted(pathlib.Path({str(directory)!r}).glob({pattern!r})))"
