"""Copy, Program and Target: what plans are made of. Pure data; nothing here runs."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import torch

from ..boxes import Box, Region, covered, whole
from ..manifest import TensorSpec
from ..sharding import Part
from ..text import some

_NAMED = 50  # tensors in one line

_OVERWRITES = frozenset(
    (
        torch.ops.aten.copy_.default,
        torch.ops.aten.fill_.Scalar,
        torch.ops.aten.fill_.Tensor,
        torch.ops.aten.zero_.default,
    )
)
"""Operations that overwrite all of their first operand, so that reading it first is no reading."""


class Fate(enum.Enum):
    """What becomes of one tensor of the source, or of one name of the model."""

    WRITTEN = "written"
    TIED = "tied"  # its destination is another name's too, which is written; equal content is proven
    CAST = "cast"  # written, in another dtype
    SKIPPED = "skipped"  # the model's own loading code drops it
    MISSING = "missing"  # a name of the model that nothing writes, allowed
    PARTIAL = "partial"  # a name of the model of which some bytes are written, allowed
    UNEXPECTED = "unexpected"  # a tensor that no name takes, allowed
    MISMATCHED = "mismatched"  # a tensor whose shape is not that of its name, and that name, allowed


class Copy(msgspec.Struct, frozen=True, gc=False):
    """A box of one source tensor into a box of one destination, cast if the dtypes differ.

    Attributes:
        source: the source tensor's name.
        destination: the model tensor's name.
        of: which part of the source; ``None`` for all of it.
        into: which part of the destination; ``None`` for all of it.
    """

    source: str
    destination: str
    of: Box | None = None
    into: Box | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """The source tensor, as the only one of a tuple."""
        return (self.source,)

    @property
    def written(self) -> Iterator[tuple[str, Box | None]]:
        """What of the model's tensors it writes; ``None`` for all of one."""
        yield self.destination, self.into

    @property
    def destinations(self) -> tuple[str, ...]:
        """Names of the model's tensors that it writes."""
        return (self.destination,)


class Op(msgspec.Struct, frozen=True):
    """One recorded operation.

    Attributes:
        func: the ATen overload.
        args: positional arguments, tensors replaced by regions.
        kwargs: keyword arguments, likewise.
        results: a region for each tensor that it returns and that is no operand.
        writes: regions of operands that it changes.
        reads: regions of all its operands.
    """

    func: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Region, ...]
    writes: tuple[Region, ...]
    reads: tuple[Region, ...]


def read_too_early(ops: Iterable[Op], written: dict[str, list[Box]]) -> set[str]:
    """Names of the model's tensors of which operations read bytes that nothing has written before.

    ``written`` holds the boxes that were written by then, by name; what these operations write is added to it.
    """
    early = set()
    for op in ops:
        overwritten = op.writes[:1] if op.func in _OVERWRITES else ()
        for region in op.reads:
            if region.memory.kind == "model" and region not in overwritten:
                name = region.memory.name
                if covered(written.get(name, ()), region.box) < region.box.numel:
                    early.add(name)
        for region in op.writes:
            if region.memory.kind == "model":
                written.setdefault(region.memory.name, []).append(region.box)
    return early


class Program(msgspec.Struct, frozen=True):
    """Recorded operations that belong together.

    Attributes:
        sources: names of the source tensors they take.
        ops: the operations, in order.
        writes: regions of the model that they write.
    """

    sources: tuple[str, ...]
    ops: tuple[Op, ...]
    writes: tuple[Region, ...]

    @property
    def written(self) -> Iterator[tuple[str, Box | None]]:
        """What of the model's tensors it writes, as a copy says it."""
        return ((region.memory.name, region.box) for region in self.writes)

    @property
    def destinations(self) -> tuple[str, ...]:
        """Names of the model's tensors that it writes, one for each write."""
        return tuple(region.memory.name for region in self.writes)


Step = Copy | Program


def layer_of(step: Step) -> str:
    """The module that owns the first tensor that the step writes."""
    return next(iter(step.destinations), "").rpartition(".")[0]


class GraphBreak(msgspec.Struct, frozen=True):
    """Something that loading code did and a plan cannot repeat.

    Attributes:
        what: in words.
        sources: names of the source tensors concerned.
        where: the line of the model's code, ``file:line``.
        with_them: names of all source tensors that the model's own code gets because of it, if there are others.
    """

    what: str
    sources: tuple[str, ...]
    where: str
    with_them: tuple[str, ...] = ()

    def __str__(self) -> str:
        all_told = f" (so {some(self.with_them, _NAMED)} go with it)" if self.with_them else ""
        return f"{self.what} of {some(self.sources, _NAMED) or 'the model'} at {self.where}{all_told}"


class Target(msgspec.Struct, frozen=True, gc=False):
    """One name of the model that can be written.

    Attributes:
        spec: its name, dtype and shape.
        owner: the first name of the same tensor; its own where it is not tied.
        problem: why it cannot be written, if it cannot.
        stride: in elements; ``None`` for a contiguous tensor.
        memory: the first name of those with which it shares memory, over or beside them; empty if there are none.
        start: its first byte in that memory.
        part: which part of a whole tensor it is, where this rank holds no more; the spec is that of the part.
    """

    spec: TensorSpec
    owner: str
    problem: str = ""
    stride: tuple[int, ...] | None = None
    memory: str = ""
    start: int = 0
    part: Part | None = None

    @property
    def box(self) -> Box:
        """All of it, as it lies in memory."""
        assert isinstance(self.spec.dtype, torch.dtype)
        return whole(self.spec) if self.stride is None else Box(self.spec.dtype, self.spec.shape, self.stride, 0)
