"""Part: which elements of a tensor this rank holds. The placements of a DTensor are read here, and become geometry."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import torch

from . import signals

Run = tuple[int, int]
"""Indices of one dimension that follow each other: the first one, and how many."""

GATHER = "hotweights.open(state, gather=True), called on every rank, makes whole tensors of its DTensors"
"""What to do where a source has parts and whole tensors are needed."""


class Block(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Elements that are a box of the whole tensor and a box of this rank's.

    Attributes:
        start: index of the first of them in the whole tensor.
        at: its index in this rank's tensor.
        shape: how many in each dimension.
    """

    start: tuple[int, ...]
    at: tuple[int, ...]
    shape: tuple[int, ...]


class MeshLayout(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How tensors lie on a mesh of ranks. It is the same on all of them.

    Attributes:
        ranks: of the mesh, row-major.
        mesh: its shape.
        splits: for each dimension of the mesh, which dimension of a tensor is divided along it, counted from 0, and in
            how many chunks, each of which is divided by itself; ``None`` where all hold the same.
    """

    ranks: tuple[int, ...]
    mesh: tuple[int, ...]
    splits: tuple[tuple[int, int] | None, ...]

    def blocks(self, shape: tuple[int, ...], place: int) -> tuple[Block, ...]:
        """What the rank at this place in ``ranks`` holds of a tensor of this shape."""
        runs = self.runs(shape, _coordinate(place, self.mesh))
        return tuple(_blocks(runs)) if all(runs) else ()

    def runs(self, shape: tuple[int, ...], coordinate: Iterable[int]) -> list[list[Run]]:
        """The same, for a coordinate in the mesh and as runs in each dimension; there are none where it is empty."""
        runs = [[(0, length)] if length else [] for length in shape]
        for split, count, number in zip(self.splits, self.mesh, coordinate, strict=True):
            if split is not None:
                dim, chunks = split
                runs[dim] = _shard(runs[dim], count, number, chunks)
        return runs


def _coordinate(place: int, mesh: tuple[int, ...]) -> list[int]:
    coordinate = []
    for length in reversed(mesh):
        place, at = divmod(place, length)
        coordinate.append(at)
    return coordinate[::-1]


class Part(msgspec.Struct, frozen=True, gc=False):
    """What this rank holds of a tensor.

    Attributes:
        shape: of the whole tensor.
        blocks: the elements that this rank holds, none of them twice.
        placed: how the tensor lies on its mesh, for people.
        problem: why it is not known which elements these are, if it is not.
        layout: the same for all ranks of the mesh, where it is known.
    """

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    placed: str
    problem: str = ""
    layout: MeshLayout | None = None

    def same_elements(self, other: Part) -> bool:
        """Whether the other one is the same elements, in the same order."""
        return self.shape == other.shape and self.blocks == other.blocks and not (self.problem or other.problem)

    def __str__(self) -> str:
        return f"{self.placed} of {list(self.shape)}"


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor. Where nobody has imported them, there are none."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


_PLAIN = {torch.Tensor, torch.nn.Parameter}


@signals.held  # Else a signal might leave autograd off.
def local(tensor: torch.Tensor) -> tuple[torch.Tensor, Part | None]:
    """The tensor as it lies in this process, and which part of the whole that is; ``None`` where it is all of it.

    The local tensor of a DTensor is the one that it holds, not a copy.
    """
    if not is_dtensor(tensor):
        return tensor, None
    with torch.no_grad():
        inside = tensor.to_local()  # type: ignore[attr-defined]
        if hasattr(inside, "wait"):  # It comes out of a collective that may still run.
            inside = inside.wait()
    part = _part_of(tensor, tuple(inside.shape))
    whole = not part.problem and part.blocks == (_all(part.shape),)
    return inside, None if whole else part


def _all(shape: tuple[int, ...]) -> Block:
    zeros = (0,) * len(shape)
    return Block(zeros, zeros, shape)


class _Mesh:
    """What was asked of a DeviceMesh, and the parts of tensors that lie on it.

    torch works out ranks and coordinate at each call, which took most of the time of sending small tensors.
    """

    def __init__(self, mesh: Any) -> None:
        self.mesh = weakref.ref(mesh)
        self.ranks: tuple[int, ...] = tuple(mesh.mesh.flatten().tolist())
        self.shape: tuple[int, ...] = tuple(mesh.shape)
        self.coordinate: Sequence[int] | None = mesh.get_coordinate()
        self.parts: dict[object, Part] = {}


_MESHES: dict[int, _Mesh] = {}  # by identity: an equal mesh of another process group may have another coordinate
_MOST_MESHES, _MOST_PARTS = 100, 10_000


def _known(mesh: Any) -> _Mesh:
    known = _MESHES.get(id(mesh))
    if known is None or known.mesh() is not mesh:
        if len(_MESHES) >= _MOST_MESHES:
            _MESHES.clear()
        known = _MESHES[id(mesh)] = _Mesh(mesh)
    return known


def _part_of(tensor: Any, held: tuple[int, ...]) -> Part:
    """Which part a DTensor's local tensor is, whose shape is ``held``."""
    mesh = _known(tensor.device_mesh)
    shape, placements = tuple(tensor.shape), tuple(tensor.placements)
    # In words: to some versions of torch a _StridedShard equals a Shard.
    key = (shape, held, *((repr(each), getattr(each, "split_factor", 1)) for each in placements))
    part = mesh.parts.get(key)
    if part is None:
        if len(mesh.parts) >= _MOST_PARTS:
            mesh.parts.clear()
        part = mesh.parts[key] = _part_on(mesh, shape, placements, held)
    return part


def _part_on(mesh: _Mesh, shape: tuple[int, ...], placements: tuple[Any, ...], held: tuple[int, ...]) -> Part:
    placed = f"{list(placements)} on mesh {mesh.shape}"
    if any(placement.is_partial() for placement in placements):
        return Part(shape, (), placed, "each rank holds a summand of it (Partial)")
    if mesh.coordinate is None:
        return Part(shape, (), placed, "this rank is not in its mesh")
    splits = tuple(
        None if placement.is_replicate() else (placement.dim % len(shape), getattr(placement, "split_factor", 1))
        for placement in placements
    )
    layout = MeshLayout(mesh.ranks, mesh.shape, splits)
    runs = layout.runs(shape, mesh.coordinate)
    lengths = tuple(sum(length for _, length in along) for along in runs)
    if lengths != held:
        return Part(shape, (), placed, f"its placements say {list(lengths)} for this rank, which holds {list(held)}")
    if 0 in held:
        return Part(shape, (), placed, layout=layout)
    return Part(shape, tuple(_blocks(runs)), placed, layout=layout)


def _shard(runs: Sequence[Run], count: int, number: int, factor: int) -> list[Run]:
    """What the rank of this number gets of ``runs``, divided among ``count``.

    With a factor, as FSDP over tensor parallel has it: each of so many chunks is divided, and it gets one of each.
    """
    chunks = (_chunk(runs, factor, which) for which in range(factor))
    return _joined(run for chunk in chunks for run in _chunk(chunk, count, number))


def _chunk(runs: Sequence[Run], count: int, number: int) -> list[Run]:
    """The chunk of this number, of ``count`` as ``torch.chunk`` makes them: the last ones may be short or empty."""
    total = sum(length for _, length in runs)
    size = -(-total // count)
    first, last = number * size, min((number + 1) * size, total)
    taken, at = [], 0
    for start, length in runs:
        low, high = max(first, at), min(last, at + length)
        if low < high:
            taken.append((start + low - at, high - low))
        at += length
    return taken


def _joined(runs: Iterator[Run]) -> list[Run]:
    """Runs that touch are one."""
    result: list[Run] = []
    for start, length in runs:
        if result and sum(result[-1]) == start:
            result[-1] = (result[-1][0], result[-1][1] + length)
        else:
            result.append((start, length))
    return result


def _blocks(runs: Sequence[Sequence[Run]]) -> Iterator[Block]:
    """A block for each combination of runs."""
    placed = []
    for along in runs:
        at = itertools.accumulate((length for _, length in along), initial=0)
        placed.append([(start, here, length) for (start, length), here in zip(along, at, strict=False)])
    for combination in itertools.product(*placed):
        starts, ats, lengths = zip(*combination, strict=True) if combination else ((), (), ())
        yield Block(starts, ats, lengths)


# FSDP2: which tensors its modules hold while forward has gathered them.


def is_fsdp(kind: type) -> bool:
    """Whether it is the class of a module for which ``fully_shard`` was called."""
    base = _fsdp()
    return base is not None and issubclass(kind, base)


def _fsdp() -> Any:
    """The class that ``fully_shard`` gives modules; ``None`` where nobody has imported it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def shards_of(module: Any) -> Iterator[tuple[torch.nn.Module, str, torch.Tensor]]:
    """Module, key and sharded parameter of all that an FSDP2 module shards, also while gathered ones are in place."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    for group in [state._fsdp_param_group] if groups is None else groups:
        for held in () if group is None else group.fsdp_params:
            info = held._module_info
            yield info.module, info.param_name, held.sharded_param
            for owner, key in zip(info.shared_modules, info.shared_param_names, strict=True):
                yield owner, key, held.sharded_param


def reshard(modules: Iterable[torch.nn.Module]) -> None:
    """Let FSDP2 drop what it has gathered: after a write, the next forward must gather anew. It sends nothing."""
    base: Any = _fsdp()
    for module in () if base is None else modules:  # Else nobody walks a model of 20,000 modules for this.
        if isinstance(module, base):
            module.reshard()


def is_fsdps(hook: Any) -> bool:
    """Whether a hook around ``load_state_dict`` is FSDP2's own, which reshards and finds replaced parameters."""
    module = getattr(getattr(hook, "hook", hook), "__module__", None) or ""
    return module.startswith(("torch.distributed.fsdp._fully_shard", "torch.distributed._composable.fsdp"))
