"""Inside: wrapper tensors as the one tensor that each stands for, and a copy of one as copies of the tensors inside.

What fits what is decided of whole wrappers: one of which a part came from elsewhere would compute with wrong scales.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from ..manifest import Manifest, TensorSpec
from .steps import Copy, Program, Step, Target


def outer_manifest(manifest: Manifest) -> Manifest:
    """The manifest with wrappers in place of the tensors inside them."""
    if not manifest.wrapped:
        return manifest
    specs = {_outer(spec).name: _outer(spec) for spec in manifest.values()}
    origins = {
        _outer(manifest[name]).name: manifest[name].shell.outer(origin) if manifest[name].shell else origin  # type: ignore[union-attr]
        for name, origin in manifest.origins.items()
    }
    return Manifest(specs.values(), origins=origins)


def outer_targets(targets: Mapping[str, Target]) -> Mapping[str, Target]:
    """The targets with wrappers, which lie nowhere, in place of the tensors inside them."""
    if not any(target.spec.shell for target in targets.values()):
        return targets
    outer: dict[str, Target] = {}
    for target in targets.values():
        spec = _outer(target.spec)
        if target.spec.shell is None:
            outer[spec.name] = target
            continue
        before = outer.get(spec.name)
        owner = _outer(targets[target.owner].spec).name
        problem = (before.problem if before else "") or target.problem
        # Wrappers are tied where all that is inside is.
        owner = spec.name if before and before.owner != owner else owner
        outer[spec.name] = Target(spec, owner, problem)
    return outer


def _outer(spec: TensorSpec) -> TensorSpec:
    if spec.shell is None:
        return spec
    return TensorSpec(spec.shell.outer(spec.name), spec.shell.dtype, spec.shell.shape, shell=spec.shell)


class Insides:
    """What lies in the wrappers of a source and of a model."""

    def __init__(self, manifest: Manifest, targets: Mapping[str, Target]) -> None:
        self._manifest = manifest
        self._targets = targets
        self._sources = _by_wrapper(manifest)
        self._destinations = _by_wrapper({name: target.spec for name, target in targets.items()})

    def __bool__(self) -> bool:
        return bool(self._sources or self._destinations)

    def problem(self, step: Step) -> str:
        """Why this step, of whole wrappers, cannot be done; empty if it can."""
        if isinstance(step, Program) or step.of is not None or step.into is not None:
            names = [name for name in step.sources if name in self._sources]
            names += [name for name in step.destinations if name in self._destinations]
            wrapped = self._kind(names[0]) if names else ""
            return f"{names[0]}: is a {wrapped}, and is computed with, not only copied" if names else ""
        source, target = self._sources.get(step.source), self._destinations.get(step.destination)
        name = step.destination
        if target is None:
            if source is None:
                return ""
            return (
                f"{name}: is a {self._kind(step.source)} in the source and plain in the model; give a plain "
                "tensor of its values (torchao: its dequantize()), or wrap the model's in the same way first"
            )
        if source is None:
            return (
                f"{name}: is a {self._kind(name)} in the model, which has no plain bytes, and plain in the source; "
                "load the model before it is quantised, or give tensors that are wrapped in the same way"
            )
        return next((f"{name}: {words}" for words in _unlike(source, target)), "")

    def _kind(self, name: str) -> str:
        several = self._destinations.get(name) or self._sources[name]
        shell = next(iter(several.values())).shell
        return "" if shell is None else shell.kind.rpartition(".")[2]

    def steps(self, steps: Iterable[tuple[int, Step]]) -> Iterator[tuple[int, Step]]:
        """The steps, with those of wrappers as steps of what lies inside."""
        for level, step in steps:
            if isinstance(step, Copy):
                yield from ((level, copy) for copy in self._copies(step))
            else:
                yield level, step

    def ties(self, ties: Iterable[tuple[Copy, Copy]]) -> Iterator[tuple[Copy, Copy]]:
        """The ties, likewise."""
        for first, second in ties:
            yield from zip(self._copies(first), self._copies(second), strict=True)

    def _copies(self, step: Copy) -> list[Copy]:
        source, target = self._sources.get(step.source), self._destinations.get(step.destination)
        if source is None or target is None:
            return [step]
        return [Copy(source[key].name, spec.name) for key, spec in target.items() if key in source]

    def by_name(self, words: Mapping[str, Any]) -> dict[str, Any]:
        """What is said of wrappers, said of each tensor inside."""
        said: dict[str, Any] = {}
        for name, value in words.items():
            held = {**self._sources.get(name, {}), **self._destinations.get(name, {})}
            names = [spec.name for spec in held.values()]
            plain = not held or (name in self._manifest or name in self._targets)
            said.update(dict.fromkeys([*names, *([name] if plain else ())], value))
        return said

    def outer(self, pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """Pairs of targets as pairs of what they lie in."""
        for first, second in pairs:
            yield _outer(self._targets[first].spec).name, _outer(self._targets[second].spec).name


def _by_wrapper(specs: Mapping[str, TensorSpec]) -> dict[str, dict[str, TensorSpec]]:
    """For each wrapper what lies in it, by key."""
    held: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    for name, spec in specs.items():
        if spec.shell is not None:
            held[spec.shell.outer(name)][spec.shell.key] = spec
    return dict(held)


def _unlike(source: Mapping[str, TensorSpec], target: Mapping[str, TensorSpec]) -> Iterator[str]:
    """Why what lies in one wrapper means something else in the other."""
    ours, theirs = (next(iter(held.values())).shell for held in (source, target))
    assert ours is not None
    assert theirs is not None
    yield from (f"wrapped tensors are not of one kind: {words}" for words in ours.differences(theirs))
    if source.keys() != target.keys():
        yield f"{', '.join(target)} expected inside, {', '.join(source)} found"
    for key in target.keys() & source.keys():
        expected, found = (msgspec.structs.replace(held[key], name=key, shell=None) for held in (target, source))
        if (found.dtype, found.shape) != (expected.dtype, expected.shape):
            yield f"{expected} expected inside, {found} found"
