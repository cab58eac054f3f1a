"""Local: the steps of a plan for whole tensors, cut down to the parts of them that this rank holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ..boxes import Box, contiguous, narrowed, row_major, slices, whole
from ..dtypes import OpaqueDtype
from ..manifest import Manifest, TensorSpec
from ..sharding import GATHER, Block, Part
from .steps import Copy, Step, Target


def whole_manifest(manifest: Manifest) -> Manifest:
    """The manifest with whole tensors in place of parts."""
    if not any(spec.part for spec in manifest.values()):
        return manifest
    return Manifest(_whole(spec, spec.part) for spec in manifest.values())


def whole_targets(targets: Mapping[str, Target]) -> Mapping[str, Target]:
    """The targets with whole tensors, which lie nowhere, in place of parts."""
    if not any(target.part for target in targets.values()):
        return targets
    return {name: _whole_target(target) for name, target in targets.items()}


def _whole(spec: TensorSpec, part: Part | None) -> TensorSpec:
    return spec if part is None else TensorSpec(spec.name, spec.dtype, part.shape)


def _whole_target(target: Target) -> Target:
    if target.part is None:
        return target
    return Target(_whole(target.spec, target.part), target.owner, target.problem)


class Local:
    """The steps for what this rank holds of the source and of the model.

    Attributes:
        problems: what cannot be cut down.
    """

    def __init__(self, manifest: Manifest, targets: Mapping[str, Target]) -> None:
        self.problems: list[str] = []
        self._manifest = manifest
        self._targets = targets

    def steps(self, steps: Iterable[tuple[int, Step]]) -> Iterator[tuple[int, Step]]:
        """The steps, with the levels they had."""
        for level, step in steps:
            yield from ((level, cut) for cut in self._cut(step))

    def ties(self, ties: Iterable[tuple[Copy, Copy]]) -> Iterator[tuple[Copy, Copy]]:
        """The ties: of what is cut into blocks, a pair for each."""
        for first, second in ties:
            yield from zip(self._copies(first), self._copies(second), strict=False)

    def _cut(self, step: Step) -> Iterator[Step]:
        if isinstance(step, Copy):
            yield from self._copies(step)
            return
        parts = [name for name in step.destinations if self._part(name)]
        parts += [name for name in step.sources if self._manifest[name].part]
        for name in dict.fromkeys(parts):
            self.problems.append(
                f"{name}: is a part of a tensor ({self._part(name) or self._manifest[name].part}), and is computed "
                "with, not only copied; load the model before it is sharded"
            )
        if not parts:
            yield step

    def _part(self, name: str) -> Part | None:
        target = self._targets.get(name)
        return None if target is None else target.part

    def _copies(self, step: Copy) -> Iterator[Copy]:
        spec, ours = self._manifest[step.source], self._part(step.destination)
        theirs = spec.part
        if theirs is None and ours is None:
            yield step
        elif theirs is None:
            yield from self._sliced(step, spec)
        elif ours is None:
            self.problems.append(f"{step.destination}: the source holds a part of it, {theirs}; {GATHER}")
        elif not theirs.same_elements(ours):
            self.problems.append(
                f"{step.destination}: the model holds {ours}, the source {theirs}: not the same parts; {GATHER}"
            )
        elif step.of is not None or step.into is not None:
            self.problems.append(f"{step.destination}: is written from slices of {theirs}; {GATHER}")
        elif ours.blocks:
            yield step

    def _sliced(self, step: Copy, spec: TensorSpec) -> Iterator[Copy]:
        """A copy from a whole tensor of the source."""
        target = self._targets[step.destination]
        assert target.part is not None
        everything = whole(_whole(target.spec, target.part))
        if isinstance(spec.dtype, OpaqueDtype) or target.problem:
            return  # That is a problem already.
        spans = [(0, length) for length in target.part.shape] if step.into is None else slices(step.into, everything)
        of = None if spans is None else _shaped(step.of or whole(spec), tuple(stop - start for start, stop in spans))
        if spans is None or of is None:
            self.problems.append(
                f"{step.destination}: is a part of a tensor ({target.part}), and is written in other slices than can "
                "be cut; load the model before it is sharded"
            )
            return
        for block in target.part.blocks:
            cut = _meeting(block, spans)
            if cut is not None:
                start, at, shape = cut
                into = narrowed(target.box, at, shape)
                yield Copy(
                    step.source, step.destination, narrowed(of, start, shape), None if into == target.box else into
                )


def _shaped(box: Box, shape: tuple[int, ...]) -> Box | None:
    """The same elements in another shape, where that is a box."""
    if box.shape == shape:
        return box
    return Box(box.dtype, shape, row_major(shape), box.offset) if contiguous(box) else None


def _meeting(
    block: Block, spans: Iterable[tuple[int, int]]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """What a block and a range of indices in each dimension have in common.

    Returns:
        Where it begins within those ranges, where in this rank's tensor, and its shape; ``None`` if it is nothing.
    """
    begin, at, shape = [], [], []
    for start, here, length, (first, stop) in zip(block.start, block.at, block.shape, spans, strict=True):
        low, high = max(start, first), min(start + length, stop)
        if low >= high:
            return None
        begin.append(low - first)
        at.append(here + low - start)
        shape.append(high - low)
    return tuple(begin), tuple(at), tuple(shape)
