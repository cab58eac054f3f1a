"""Index: the JSON file that names the file of each tensor, and where it and the files disagree."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

from ...errors import CheckpointError
from .header import BEGINNING, MAX_HEADER_NBYTES, refuse_other_formats
from .place import Place, Readable, open_place


def read_index(file: Readable) -> tuple[dict[str, str], list[str]]:
    """The file of each tensor, ``""`` where the index gives no name; and what is wrong with the index itself."""
    index = file.path
    if file.size > MAX_HEADER_NBYTES:
        raise CheckpointError(
            f"{index}: an index of {file.size} bytes; at most {MAX_HEADER_NBYTES} are allowed", cause="bad_index"
        )
    if file.size == 0:
        raise CheckpointError(f"{index}: the file is empty", cause="empty")
    raw = file.pread(file.size, 0)
    refuse_other_formats(index, file.size, raw[:BEGINNING])
    problems: set[str] = set()

    def without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        table = dict(pairs)
        if len(table) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            problems.update(f"the name {name!r} occurs twice" for name, times in counts.items() if times > 1)
        return table

    try:
        content = json.loads(raw, object_pairs_hook=without_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a JSON object: {error}", cause="bad_index") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if weight_map is None and str(index).endswith("config.json"):
        raise CheckpointError(
            f"{index}: is a configuration, no index of weights; give the directory that it lies in", cause="bad_index"
        )
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index}: no "weight_map" that names the file of each tensor', cause="bad_index")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard:
            problems.add(f"tensor {name!r}: its file is {shard!r}, which is no name")
            weight_map[name] = ""
    return weight_map, sorted(problems)


def files_named_by(index: Place) -> set[str]:
    """The names of the files that an index names; none if it cannot be read: whoever opens it finds out why."""
    try:
        file = open_place(index)
    except CheckpointError:
        return set()
    try:
        return set(read_index(file)[0].values())
    except CheckpointError:
        return set()
    finally:
        file.close()


def lies_outside(name: str) -> bool:
    """Whether a name in an index leads out of its directory.

    The text decides, not where links lead: the files of a hub cache are links that leave the directory.
    """
    return PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name


def disagreements(
    directory: Place, weight_map: dict[str, str], homes: dict[str, list[str]], opened: Iterable[str]
) -> list[str]:
    """Every tensor that does not lie where the index says. Files that are absent were reported already.

    Args:
        directory: where the index lies.
        weight_map: what it says.
        homes: the files that hold each tensor.
        opened: the files that could be opened.
    """
    problems: list[str] = []
    there = set(opened)
    for name, shard in weight_map.items():
        promised = str(directory / shard)
        actual = homes.get(name, [])
        if not shard or promised in actual:
            continue
        if actual:
            problems.append(
                f"tensor {name!r}: the index says {shard}; it lies in {os.path.relpath(actual[0], directory)}"
            )
        elif promised in there:
            problems.append(f"tensor {name!r}: the index says {shard}, which does not hold it")
    return problems


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
