"""Absent: which tensors a source lacks of those that fill one tensor of the model, by how its likes are filled."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import cache

from ..manifest import TensorSpec
from .steps import Step

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A part of a name that is a number: of a layer, or of an expert."""


def absent_from(manifest: Container[str], steps: Iterable[Step]) -> Callable[[Sequence[str]], list[str]]:
    """A function of all names of one tensor of the model: the names of what it lacks, sorted; empty if nobody knows.

    Its likes are the tensors whose names differ from its own in numbers only, as of another layer. Where a tensor takes
    several of one kind, as of experts, every kind is expected to have all their numbers, from the first to the last.
    """

    @cache  # Only where something is absent at all.
    def seen() -> tuple[dict[str, set[str]], dict[str, str]]:
        filled_by: dict[str, set[str]] = defaultdict(set)
        for step in steps:
            for destination in step.destinations:
                filled_by[destination].update(step.sources)
        likes: dict[str, str] = {}  # Of several likes, the one that takes most.
        for name, sources in filled_by.items():
            kind = _NUMBER.sub("#", name)
            if kind not in likes or len(sources) > len(filled_by[likes[kind]]):
                likes[kind] = name
        return filled_by, likes

    def absent(names: Sequence[str]) -> list[str]:
        filled_by, likes = seen()
        for name in names:
            own = filled_by.get(name, set())
            like = likes.get(_NUMBER.sub("#", name), name)
            expected = {_moved(source, like, name) for source in filled_by.get(like, ())} | _in_rows(own)
            lacking = expected - own
            # Else these are not its likes: it takes what they do not, or what they take is there and goes elsewhere.
            if lacking and own < expected and lacking != {name} and not any(source in manifest for source in lacking):
                return sorted(lacking, key=_natural)
        return []

    return absent


def unlike_in(manifest: Mapping[str, TensorSpec]) -> Callable[[Sequence[str]], list[str]]:
    """A function of names of the source: what is said of those whose shape is not that of most of their likes."""

    @cache  # Only where something is wrong at all.
    def seen() -> dict[str, Counter[tuple[int, ...]]]:
        shapes: dict[str, Counter[tuple[int, ...]]] = defaultdict(Counter)
        for name, spec in manifest.items():
            shapes[_NUMBER.sub("#", name)][spec.shape] += 1
        return shapes

    def unlike(names: Sequence[str]) -> list[str]:
        found = []
        for name in names:
            own, shapes = manifest[name].shape, seen()[_NUMBER.sub("#", name)]
            usual, count = shapes.most_common(1)[0]
            if usual != own and count > shapes[own]:
                found.append(f"{name} is {list(own)}, and {list(usual)} in {count} other layers")
        return found

    return unlike


def _moved(source: str, like: str, name: str) -> str:
    """The source's name with the numbers of ``name`` in place of those of ``like``, in their order."""
    numbers = list(zip(_NUMBER.findall(like), _NUMBER.findall(name), strict=True))

    def number(match: re.Match[str]) -> str:
        return numbers.pop(0)[1] if numbers and numbers[0][0] == match[0] else str(match[0])

    return _NUMBER.sub(number, source)


def _in_rows(sources: Iterable[str]) -> set[str]:
    """The sources, and what they lack to be of the same numbers in each kind: ``0.w1, 0.w3, 2.w1`` lack three."""
    numbers: dict[str, set[str]] = defaultdict(set)
    for source in sources:
        if found := list(_NUMBER.finditer(source)):
            last = found[-1]
            numbers[f"{source[: last.start()]}\0{source[last.end() :]}"].add(last[0])
    seen = {int(number) for several in numbers.values() for number in several}
    every = [str(number) for number in range(min(seen), max(seen) + 1)] if seen else []
    return {*sources, *(kind.replace("\0", number) for kind in numbers for number in every)}


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
