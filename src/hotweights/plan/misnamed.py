"""Misnamed: names of a source and a model that are the same behind other prefixes, and the cure."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import NamedTuple

from ..manifest import Manifest
from ..rename import renamer
from ..text import some

_SAMPLE = 64  # Names that are compared with all others: they differ as the rest does.
_ENTRIES = 4  # A longer mapping is no advice that people would type.
_ALIKE = 20  # From this many on, names with one beginning are counted, and a few are shown.


class Misnamed(NamedTuple):
    """How names differ.

    Attributes:
        problem: says so in one line, with the argument that cures it.
        sources: the names of the source that it explains.
        targets: the names of the model.
    """

    problem: str
    sources: set[str]
    targets: set[str]


def misspelt(
    manifest: Manifest, unexpected: Collection[str], missing: Mapping[str, tuple[int, ...] | None]
) -> dict[str, str]:
    """What is added to the problems of names that stand for one missing name, it seems.

    It is much like it, has the same numbers in it, and the same shape where that is known (not ``None``).
    Of many names nothing is said.
    """
    meant: dict[str, str] = {}
    for name in unexpected if max(len(unexpected), len(missing)) < _ALIKE else ():
        alike = [
            other
            for other, shape in missing.items()
            if shape in (None, manifest[name].shape) and _numbers(other) == _numbers(name)
        ]
        close = get_close_matches(name, alike, n=2, cutoff=0.8)
        if len(close) == 1:
            # Whoever renames already would type it in the place of that.
            rename = "" if manifest.origins else f" rename={json.dumps({name: close[0]})}"
            meant[name] = f"; did you mean {close[0]}?{rename}"
    return meant


def _numbers(name: str) -> list[str]:
    return re.findall(r"\d+", name)


def misnamed(manifest: Manifest, unexpected: Collection[str], missing: Collection[str]) -> Misnamed | None:
    """How most of the ``unexpected`` names become ``missing`` ones, if it is by a prefix or very few of them."""
    said = {name: manifest.origins.get(name, name) for name in manifest}  # ``rename=`` is given the source's own.
    ours = {said[name]: name for name in unexpected}
    found = _evident(_found(ours, missing), len(said))
    if len(found) < 2 or 2 * len(found) < min(len(ours), len(missing)):
        return None
    rename = _without_harm(found, [name for name in said.values() if name not in ours])
    if rename is None:
        return None
    every = f"all {len(found)}" if len(found) == len(manifest) else f"{len(found)}"
    targets = {after + name[len(before) :] for name, (before, after) in found.items()}
    cure = "leave rename= out" if rename == {"": ""} else f"rename={json.dumps(rename)}"
    return Misnamed(
        f"{every} names of the source {_in_words(found, targets)}: {cure}",
        {ours[name] for name in found},
        targets,
    )


def _found(names: Iterable[str], missing: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The names that would be missing ones with another prefix: what they begin with, and what they should."""
    left, lacking = dict.fromkeys(names), set(missing)
    found: dict[str, tuple[str, str]] = {}
    for _ in range(_ENTRIES):
        pair = _difference(list(left), lacking)
        if pair is None:
            break
        before, after = pair
        hits = [name for name in left if name.startswith(before) and after + name[len(before) :] in lacking]
        if len(hits) < 2 or any(before == other for other, _ in found.values()):
            break
        found |= dict.fromkeys(hits, pair)
        for name in hits:
            del left[name]
            lacking.discard(after + name[len(before) :])
    return found


def _evident(found: Mapping[str, tuple[str, str]], total: int) -> dict[str, tuple[str, str]]:
    """What is a wrapper more or less, or most of a source of ``total`` names.

    Two heads of other words, such as ``pooler.dense`` and ``transform.dense``, may end alike: to advise one for the
    other would load wrong weights.
    """
    counts = Counter(found.values())
    large = {pair for pair, count in counts.items() if 4 * count > total}
    if 2 * sum(counts[pair] for pair in large) <= total:
        large = set()
    return {name: pair for name, pair in found.items() if pair in large or _is_wrapper(*pair)}


def _is_wrapper(before: str, after: str) -> bool:
    """Whether one has all parts of the other, in their order, and more of them."""
    shorter, longer = sorted((before.split(".")[:-1], after.split(".")[:-1]), key=len)
    rest = iter(longer)
    return all(part in rest for part in shorter)


def _without_harm(found: Mapping[str, tuple[str, str]], fitting: Collection[str]) -> dict[str, str] | None:
    """The shortest mapping that renames what was found and none of the names that fit; ``None`` if all are long."""
    rename = dict(found.values())
    narrow = {}
    for name, (before, after) in found.items():
        first = name[len(before) :].partition(".")[0] + "."
        narrow[before + first] = after + first
    for mapping in (rename, narrow):
        new = renamer(mapping)
        moved = all(new(name) == after + name[len(before) :] for name, (before, after) in found.items())
        if len(mapping) <= _ENTRIES and moved and all(new(name) == name for name in fitting):
            return mapping
    return None


def _in_words(found: Mapping[str, tuple[str, str]], targets: Iterable[str]) -> str:
    pairs = {*found.values()}
    if len(pairs) > 1:
        return "begin otherwise than the model's"
    ((before, after),) = pairs
    if before == after:
        return "fit as they are, with no other names"
    if before and after:
        return f'begin with "{before}" where the model\'s begin with "{after}"'
    if not before:
        return f'do not begin with "{after}"; the model\'s do'
    if any(name.startswith(before) for name in targets):
        return f'begin with another "{before}" than the model\'s'
    return f'begin with "{before}"; the model\'s do not'


def _difference(names: list[str], lacking: Collection[str]) -> tuple[str, str] | None:
    """What most names begin with, and what those begin with that end alike; ``None`` if either could be another."""
    by_end: dict[str, list[str]] = defaultdict(list)
    for name in lacking:
        by_end[name.rpartition(".")[2]].append(name)
    counts: Counter[tuple[str, str]] = Counter()
    for name in names[:: max(1, len(names) // _SAMPLE)]:
        heads = [_heads(name, other) for other in by_end[name.rpartition(".")[2]]]
        nearest = min((len(before) for before, _ in heads), default=0)
        counts.update({pair for pair in heads if len(pair[0]) == nearest})
    for pair, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        # Of A. and B. either may be a.: to advise one would load wrong values.
        if not any(count == counts[other] and _compete(pair, other) for other in counts):
            return pair
    return None


def _compete(pair: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether the two cannot both be: one beginning would become two, or two the same."""
    return pair != other and (pair[0] == other[0] or pair[1] == other[1])


def _heads(name: str, other: str) -> tuple[str, str]:
    """What is left of both when the parts at the end that are the same are taken off."""
    ours, theirs = name.split("."), other.split(".")
    same = 0
    while same < min(len(ours), len(theirs)) and ours[-1 - same] == theirs[-1 - same]:
        same += 1
    return tuple("".join(f"{part}." for part in parts[: len(parts) - same]) for parts in (ours, theirs))  # type: ignore[return-value]


def shortened(lines: Mapping[str, str], what: str) -> Iterator[str]:
    """The problems of some names, a line each; one line in all where very many begin alike.

    Args:
        lines: by name.
        what: is wrong with each of them.
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for name in lines:
        alike[name.partition(".")[0]].append(name)
    for first, names in alike.items():
        if len(names) < _ALIKE:
            yield from (lines[name] for name in names)
        else:
            yield f"{first}.*: {len(names)} names are {what}: {some(names, 3)}"


def parametrised(names: Iterable[str]) -> str:
    """What to do where names are those of parametrised tensors, which no other name stands for; empty if none is."""
    every = set(names)
    found = sorted(name for name in every if "parametrizations" in name.split(".") or _of_weight_norm(name, every))
    if not found:
        return ""
    return (
        f"{found[0]} is what torch keeps of a parametrised tensor. Parametrise both sides alike before loading, or "
        "neither: torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm."
    )


def _of_weight_norm(name: str, every: Collection[str]) -> bool:
    return name.endswith("_g") and {name[:-2], f"{name[:-2]}_v"} <= set(every)
